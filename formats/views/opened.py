"""Opens a quantized checkpoint of any dialect, and shows it as canonical tensors of our formats.

with open_quantized("out/transformer") as quantized:
    quantized.dialect                                  # "comfyui"; None if nothing in it is quantized
    for stem, layer in quantized.layers.items():
        layer.format.label, layer.shape
        layer.read(0, 128)                             # canonical tensors of some rows
        layer.dequantize(0, 128)                       # float32 [rows, in]
    quantized.kept                                     # name → the name in the file of what is not quantized
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.json_file import parse_json, read_json
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.base import Dialect, Found, StoredLayer
from omni_convert.formats.dialects.table import find_dialect
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout

__all__ = [
    "DESCRIPTIONS",
    "SIDECARS",
    "QuantizedCheckpoint",
    "QuantizedLayer",
    "describe",
    "open_quantized",
    "read_quantized",
]

SIDECARS = ("hf_quant_config.json", "quantization_config.json")
DESCRIPTIONS = "quant_model_description*.json"


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer that is stored quantized.

    Attributes:
        checkpoint: where its tensors are
        stored: which they are, and how they are laid out
        tensors: canonical suffix to layout
    """

    checkpoint: Checkpoint
    stored: StoredLayer
    tensors: Mapping[str, TensorLayout]

    @property
    def stem(self) -> str:
        return self.stored.stem

    @property
    def format(self) -> Format:
        return self.stored.format

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape

    @property
    def sources(self) -> tuple[str, ...]:
        """Names in the file of every tensor that belongs to the layer."""
        return (*filter(None, map(self.source_of, self.tensors)), *self.stored.unused)

    def source_of(self, suffix: str) -> str | None:
        """Name in the file of a canonical tensor; None if the dialect leaves it out."""
        return None if suffix in self.stored.ones else self.stored.name_of(suffix)

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(self.checkpoint[name].nbytes for name in self.sources)

    def read_tensor(self, suffix: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a canonical tensor, its own rows; all of one that belongs to the whole weight."""
        layout = self.tensors[suffix]
        if suffix in self.stored.ones:
            return torch.ones(layout.shape, dtype=layout.dtype)
        codec = self.stored.spelling.codec(suffix)
        return codec.read(self.checkpoint, self.stored.name_of(suffix), layout, start, stop)

    def read(self, start: int, stop: int) -> dict[str, Tensor]:
        """Every canonical tensor of rows `start` to `stop` of the weight.

        `start` is a multiple of the format's `row_multiple`, and `stop` too or the last row.
        """
        return {
            suffix: self.read_tensor(suffix, start // (layout.rows_per_entry or 1), _last_entry(stop, layout))
            for suffix, layout in self.tensors.items()
        }

    def dequantize(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the weight, float32."""
        multiple = self.format.row_multiple
        first = start // multiple * multiple
        last = min(-(-stop // multiple) * multiple, self.shape[0])
        return self.format.dequantize(self.read(first, last))[start - first : stop - first]


def _last_entry(stop: int, layout: TensorLayout) -> int:
    return -(-stop // (layout.rows_per_entry or 1))


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint, and which of its tensors are quantized layers.

    Attributes:
        dialect: its name; None if nothing is quantized
        layers: stem to layer, in checkpoint order
        kept: name of a tensor that is not quantized → its name in the file
    """

    checkpoint: Checkpoint
    dialect: str | None
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    block: Mapping[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.checkpoint.close()


def open_quantized(path: Path) -> QuantizedCheckpoint:
    """Opens a component folder or a single file; headers, configs and tiny markers are read, no weight.

    Raises:
        CheckpointError: the files are damaged; a tensor of a quantized layer is missing or has another dtype or shape
            than its dialect says; or a format cannot be read.
    """
    checkpoint = Checkpoint.open(path)
    folder = path if path.is_dir() else path.parent
    return read_quantized(checkpoint, folder)


def read_quantized(checkpoint: Checkpoint, folder: Path) -> QuantizedCheckpoint:
    """As `open_quantized`, for a checkpoint that is open.

    Args:
        folder: where its config.json and sidecars are, if there are some

    Raises:
        CheckpointError: see there.
    """
    found = describe(checkpoint, folder)
    dialect = find_dialect(found)
    if dialect is None:
        return QuantizedCheckpoint(checkpoint, None, {}, {name: name for name in checkpoint}, found.block)
    layers = {stored.stem: _checked(checkpoint, stored, dialect) for stored in dialect.stored_layers(found)}
    used = {name for layer in layers.values() for name in layer.sources}
    kept = dialect.kept_names(found, [name for name in checkpoint if name not in used])
    return QuantizedCheckpoint(checkpoint, dialect.name, layers, kept, found.block)


def describe(checkpoint: Checkpoint, folder: Path) -> Found:
    """What the files say about a checkpoint.

    Args:
        folder: where its config.json and sidecars are, if there are some

    Raises:
        CheckpointError: one of these is no JSON object.
    """
    return Found(checkpoint, _block(folder, checkpoint), _metadata(checkpoint), _labels(folder))


def _checked(checkpoint: Checkpoint, stored: StoredLayer, dialect: Dialect) -> QuantizedLayer:
    layouts = stored.format.layout(*stored.shape)
    for suffix, layout in layouts.items():
        name = stored.name_of(suffix)
        if suffix in stored.ones:
            continue
        if name not in checkpoint:
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}' is missing, expected with {stored.format.label} as {dialect.name} "
                "spells it; the file is incomplete"
            )
        expected = stored.spelling.codec(suffix).mismatch(checkpoint[name], layout)
        if expected is not None:
            spec = checkpoint[name]
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}': found {DTYPE_NAMES[spec.dtype]} {list(spec.shape)}, expected "
                f"{expected} for {stored.format.label} as {dialect.name} spells it"
            )
    return QuantizedLayer(checkpoint, stored, layouts)


def _block(folder: Path, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config block: of config.json, of a sidecar, or of the files' headers."""
    block = _json(folder / "config.json").get("quantization_config")
    if isinstance(block, dict) and block:
        return block
    for name in SIDECARS:
        if sidecar := _json(folder / name):
            return sidecar
    try:
        return parse_json(_metadata(checkpoint).get("quantization_config", "{}").encode(), checkpoint.path)
    except CheckpointError:
        return {}


def _labels(folder: Path) -> dict[str, str]:
    """MsModelSlim's description, if there is one."""
    descriptions = sorted(folder.glob(DESCRIPTIONS))
    if len(descriptions) != 1:
        return {}
    labels = _json(descriptions[0])
    # One that is no text makes its tensor unreadable, and its reader says so.
    return {name: label if isinstance(label, str) else reprlib.repr(label) for name, label in labels.items()}


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    return {key: text for file in checkpoint.files.values() for key, text in file.metadata.items()}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    return read_json(path) if path.exists() else {}
