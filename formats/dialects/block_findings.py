"""Findings about config blocks, marks and labels that several dialects report."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omni_convert.formats.finding import Finding

__all__ = ["FIX_BLOCK", "block_mismatch", "unknown_keys"]

FIX_BLOCK = "correct quantization_config in config.json, or convert with -m keep"


def block_mismatch(stem: str, what: str, reader: str) -> Finding:
    """A layer that is not what its block or label declares."""
    return Finding("error", "block-mismatch", stem, what, f"{reader}: fails to load, or computes noise", FIX_BLOCK)


def unknown_keys(block: Mapping[str, Any], known: Collection[str], reader: str, *, is_fatal: bool) -> Iterator[Finding]:
    """Keys of a block that its reader does not know.

    Args:
        is_fatal: the reader fails at startup; others ignore or refuse the key
    """
    for key in block:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:64], known, n=1)
            yield Finding(
                "error" if is_fatal else "warning", "unknown-key", "",
                f"found {str(key)[:64]!r} in quantization_config",
                f"{reader}: {'TypeError at startup' if is_fatal else 'ignores or refuses it'}",
                f"did you mean '{near[0]}'? else remove it" if near else "remove it",
            )  # fmt: skip
