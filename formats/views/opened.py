"""Opens a quantized checkpoint of any dialect, and shows it as canonical tensors of our formats.

with checks.meaning.open_quantized("out/transformer") as quantized:
    quantized.dialect                                  # "comfyui"; None if nothing in it is quantized
    for stem, layer in quantized.layers.items():
        layer.format.label, layer.shape
        layer.read(0, 128)                             # canonical tensors of some rows
        layer.dequantize(0, 128)                       # float32 [rows, in]
    quantized.kept                                     # name → the name in the file of what is not quantized
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.swizzle import padded_scale_shape
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.base import Dialect, LayerError, StoredLayer
from omni_convert.formats.dialects.codec import Swizzled
from omni_convert.formats.dialects.found import Found
from omni_convert.formats.dialects.named_otherwise import layers_named_otherwise
from omni_convert.formats.dialects.table import DIALECTS, find_dialect
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout

# What the names of packed codes end in, and those of the weights that they stand for do not.
PACKED = "_packed"

__all__ = [
    "QuantizedCheckpoint",
    "QuantizedLayer",
    "Reading",
    "read_layers",
]


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
        ranges = {suffix: layout.entries_of(start, stop) for suffix, layout in self.tensors.items()}
        return {suffix: self.read_tensor(suffix, rows.start, rows.stop) for suffix, rows in ranges.items()}

    def dequantize(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the weight, float32."""
        multiple = self.format.row_multiple
        first = start // multiple * multiple
        last = min(-(-stop // multiple) * multiple, self.shape[0])
        return self.format.dequantize(self.read(first, last))[start - first : stop - first]


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

    @property
    def ranks(self) -> set[int]:
        """The ranks of branches beside its layers."""
        axes = ((layer, *axis) for layer in self.layers.values() for axis in layer.format.rank_axes.items())
        return {layer.tensors[suffix].shape[axis] for layer, suffix, axis in axes}

    @property
    def shown_dialect(self) -> str | None:
        """The dialect if layers or the container show it; None if a block or a scale alone does."""
        is_shown = bool(self.layers) or (self.dialect is not None and DIALECTS[self.dialect].declared_by == "container")
        return self.dialect if is_shown else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.checkpoint.close()


@dataclass(frozen=True)
class Reading:
    """Everything that can be read of a checkpoint, even if it is damaged.

    Attributes:
        dialect: None if nothing is quantized
        layers: stem to each layer whose tensors are what the dialect says
        damaged: layers of which a tensor is missing or is something else
        errors: why the others cannot be read, in the order in which strict reading comes across them
    """

    found: Found
    dialect: Dialect | None = None
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    damaged: tuple[QuantizedLayer, ...] = ()
    errors: tuple[CheckpointError, ...] = ()

    @property
    def is_unreadable(self) -> bool:
        """Whether the dialect cannot read the component as a whole."""
        return any(not isinstance(error, LayerError) for error in self.errors)

    @property
    def quantized(self) -> QuantizedCheckpoint:
        """The checkpoint with the layers that can be read."""
        checkpoint, block = self.found.checkpoint, self.found.block
        if self.dialect is None:
            return QuantizedCheckpoint(checkpoint, None, {}, {name: name for name in checkpoint}, block)
        used = {name for layer in (*self.layers.values(), *self.damaged) for name in layer.sources}
        kept = self.dialect.kept_names(self.found, [name for name in checkpoint if name not in used])
        return QuantizedCheckpoint(checkpoint, self.dialect.name, self.layers, kept, block)


def read_layers(found: Found) -> Reading:
    """Reads every layer of a checkpoint that can be read, and collects why others cannot."""
    dialect = find_dialect(found)
    if dialect is None:
        strays = layers_named_otherwise(found, ())
        return Reading(found, errors=tuple(_undeclared(found, stray) for stray in strays))
    layers: dict[str, QuantizedLayer] = {}
    damaged: list[QuantizedLayer] = []
    errors: list[CheckpointError] = []
    try:
        for stored in _stored_layers(found, dialect):
            if isinstance(stored, LayerError):
                errors.append(stored)
                continue
            layer = QuantizedLayer(found.checkpoint, stored, stored.format.layout(*stored.shape))
            if flaws := list(_tensor_errors(layer, found, dialect)):
                damaged.append(layer)
                errors += flaws
            else:
                layers[stored.stem] = layer
    except CheckpointError as error:  # about the component as a whole
        return Reading(found, dialect, errors=(error,))
    return Reading(found, dialect, layers, tuple(damaged), tuple(errors))


def _stored_layers(found: Found, dialect: Dialect) -> Iterator[StoredLayer | LayerError]:
    """The layers of the dialect, and those whose scales are named after something else than NAME.weight."""
    used: set[str] = set()
    for stored in dialect.stored_layers(found):
        if isinstance(stored, StoredLayer):
            used |= {stored.name_of(suffix) for suffix in stored.format.layout(*stored.shape)}
            stored = _in_declared_blocks(found, stored, dialect)
        yield stored
    for stored in layers_named_otherwise(found, used):
        if isinstance(stored, StoredLayer):
            (name,) = dialect.kept_names(found, [stored.name_of("weight").removesuffix(PACKED)])
            is_usual = name.endswith(WEIGHT)
            stored = replace(stored, stem=name.removesuffix(WEIGHT), weight=None if is_usual else name)
            stored = _in_declared_blocks(found, stored, dialect)
        yield stored


def _in_declared_blocks(found: Found, stored: StoredLayer, dialect: Dialect) -> StoredLayer | LayerError:
    """A layer whose blocks have the declared size; numbers of scales alone leave several sizes possible."""
    sizes = dialect.declared_blocks(found.block)
    fmt = stored.format if sizes is None else stored.format.with_block_size(sizes)
    if fmt == stored.format:
        return stored
    declared, stated = (
        {suffix: layout.shape for suffix, layout in each.layout(*stored.shape).items()} for each in (fmt, stored.format)
    )
    if declared == stated:
        return replace(stored, format=fmt)
    what = f"found scales of {stored.format.label}, but the config says blocks of {list(sizes or ())}"
    return LayerError(found, stored.stem, f"layer '{stored.stem}': {what}", "block-mismatch")


def _undeclared(found: Found, stray: StoredLayer | LayerError) -> LayerError:
    """The error about codes with a scale in a file in which nothing says what they are."""
    layer = stray.layer if isinstance(stray, LayerError) else stray.stem
    what = f"layer '{layer}': found codes with a scale beside them, and nothing that says what they are"
    return LayerError(found, layer, what, "no-block")


def _tensor_errors(layer: QuantizedLayer, found: Found, dialect: Dialect) -> Iterator[LayerError]:
    """Tensors of a layer that are missing, or not what its dialect says."""
    expected = f"{layer.format.label} as {dialect.name} spells it"
    for suffix, layout in layer.tensors.items():
        name = layer.source_of(suffix)
        if name is None:
            continue
        spec = layer.checkpoint.get(name)
        if spec is None:
            yield LayerError(
                found,
                name,
                f"tensor '{name}' is missing, expected with {expected}; the file is incomplete",
                "missing-companion",
                "fails to load, or multiplies with whatever the parameter was filled with",
            )
        elif layer.stored.spelling.codec(suffix).mismatch(spec, layout) is not None:
            yield _mismatch(layer, suffix, found, dialect)


def _mismatch(layer: QuantizedLayer, suffix: str, found: Found, dialect: Dialect) -> LayerError:
    """A tensor that has another order, dtype or shape than it should."""
    codec, layout = layer.stored.spelling.codec(suffix), layer.tensors[suffix]
    name, stored = layer.stored.name_of(suffix), codec.stored(layout)
    spec = layer.checkpoint[name]
    shapes = [f"{DTYPE_NAMES[each.dtype]} {list(each.shape)}" for each in (spec, stored)]
    message = (
        f"tensor '{name}': found {shapes[0]}, expected {shapes[1]} for {layer.format.label} as {dialect.name} spells it"
    )
    if spec.dtype is torch.float8_e8m0fnu and dialect.fills_vllm_omni_parameters:
        return LayerError(found, name, message, "silent-cast", "copies by value, so that 2^-7 becomes 0: zero output")
    if order := _other_order(suffix, layout.shape, spec.shape, stored.shape, is_swizzled=isinstance(codec, Swizzled)):
        return LayerError(found, name, f"{message}: {order}", "scale-order")
    is_another_size = spec.elements != math.prod(stored.shape)
    check = "wrong-shape" if is_another_size or spec.dtype is stored.dtype else "wrong-dtype"
    return LayerError(found, name, message, check, "refuses it or reads other numbers")


def _other_order(
    suffix: str, linear: tuple[int, ...], found: tuple[int, ...], expected: tuple[int, ...], *, is_swizzled: bool
) -> str | None:
    """How the shape of block scales shows that they are in the other order; None if it does not."""
    if suffix != "weight_scale" or len(linear) != 2 or found == expected:
        return None
    if is_swizzled and found == linear:
        return "this is the linear shape, swizzled scales are due"
    if found == padded_scale_shape(linear[0], linear[1]):
        return "this is the shape of swizzled scales, linear ones are due"
    return None
