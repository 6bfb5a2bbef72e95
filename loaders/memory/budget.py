"""How much memory there is for a pipeline, and whether it is loaded whole or streamed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from omni_convert.formats.options import check_memory

__all__ = ["MemoryChoice", "available_memory"]

logger = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
#: The memory of a container, in cgroups of either version: its limit, and what it uses without the page cache.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)
#: What a pipeline needs beside its weights, as a part of them and at least; activations depend on the size of images.
ROOM, LEAST_ROOM = 0.2, 1 << 30
UNKNOWN = 1 << 62


@dataclass(frozen=True)
class MemoryChoice:
    """A choice of how a pipeline is held in memory, as users write it: `auto`, `full` or `stream[:GB]`.

    Attributes:
        kind: `auto`, `full` or `stream`
        limit: bytes that streaming may take; None for what there is
    """

    kind: str
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the text of an option.

        Raises:
            RecipeError: it is none of the three.
        """
        check_memory(text, "memory")
        kind, _, limit = text.partition(":")
        return cls(kind, int(float(limit) * 1e9) if limit else None)

    def streams(self, weights: Mapping[str, int], device: torch.device) -> bool:
        """Whether to stream some models; tells the user if `auto` decides so.

        Args:
            weights: name of each model → bytes that its weights would take on the device
        """
        total, free = sum(weights.values()), available_memory(device)
        if self.kind != "auto" or total + max(LEAST_ROOM, int(ROOM * total)) <= free:
            return self.kind == "stream"
        logger.warning(
            "%s of weights (%s) do not fit in the %s that are free: they stay in their files; each pass through a "
            "model reads its weights once, for all prompts that run together",
            gigabytes(total),
            ", ".join(f"{name} {gigabytes(size)}" for name, size in weights.items()),
            gigabytes(free),
        )
        return True


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or that the system would free for us; a great many if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [
        int(text) - _entry(stat, key)
        for limit, stat, key in CGROUPS
        if limit.exists() and (text := limit.read_text().strip()).isdigit()
    ]
    return min([*limits, 1024 * _entry(MEMINFO, "MemAvailable:") or UNKNOWN])


def _entry(path: Path, key: str) -> int:
    """The number after a key in a file of the system; 0 if there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)


def gigabytes(size: int) -> str:
    """A number of bytes for messages."""
    return f"{size / 1e9:.1f} GB"
