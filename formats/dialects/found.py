"""Everything that tells how a component is stored, gathered from its files before any weight is read."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.json_file import parse_json, read_json
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.table import find_family, model_class

__all__ = ["DESCRIPTIONS", "SIDECARS", "Found", "describe"]

#: Files beside the weights that hold a config block (ModelOpt), and msModelSlim's labels.
SIDECARS = ("hf_quant_config.json", "quantization_config.json")
DESCRIPTIONS = "quant_model_description*.json"


@dataclass(frozen=True)
class Found:
    """Everything that tells how a component is stored, before any weight is read.

    Attributes:
        checkpoint: its tensors
        block: `quantization_config` of its config.json, or of a sidecar; {} if there is none
        metadata: free text in the headers of its files
        labels: tensor name to quantization type, from msModelSlim's description
    """

    checkpoint: Checkpoint
    block: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def stems(self, leaf: str = "weight") -> Iterator[str]:
        """Stems of the tensors called STEM.leaf, in checkpoint order."""
        ending = f".{leaf}"
        return (name.removesuffix(ending) for name in self.checkpoint if name.endswith(ending))

    def get(self, stem: str, suffix: str) -> TensorSpec | None:
        return self.checkpoint.get(f"{stem}.{suffix}")

    @property
    def quant_method(self) -> str:
        return str(self.block.get("quant_method", ""))


def describe(checkpoint: Checkpoint, folder: Path) -> Found:
    """Gathers everything that tells how a checkpoint is stored.

    Args:
        folder: where its config.json and sidecars are, if there are some

    Raises:
        CheckpointError: one of these is no JSON object.
    """
    return Found(checkpoint, _block(folder, checkpoint), checkpoint.metadata, _labels(folder))


def _block(folder: Path, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config block: of config.json, of a sidecar, or of the files' headers."""
    config = _json(folder / "config.json")
    stage = find_family(model_class(config)).stage
    for block in (stage.block_of(config) if stage is not None else None, config.get("quantization_config")):
        if isinstance(block, Mapping) and block:
            return block
    for name in SIDECARS:
        if sidecar := _json(folder / name):
            return sidecar
    try:
        return parse_json(checkpoint.metadata.get("quantization_config", "{}").encode(), checkpoint.path)
    except CheckpointError:
        return {}


def _labels(folder: Path) -> dict[str, str]:
    """MsModelSlim's description, if there is one."""
    descriptions = sorted(folder.glob(DESCRIPTIONS))
    if len(descriptions) != 1:
        return {}
    labels = _json(descriptions[0])
    # A label that is no text makes its tensor unreadable, which the dialect reports.
    return {name: label if isinstance(label, str) else reprlib.repr(label) for name, label in labels.items()}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    return read_json(path) if path.exists() else {}
