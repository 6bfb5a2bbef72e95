"""Quantized layers that a reader holds as two, each with some of the columns: cut for it, and joined again.

Codes, and scales of groups of columns, go with their columns. What belongs to all columns goes to both parts; where
these are joined, it must be the same in both. Two branches of low rank are joined as one of twice the rank; all other
layers get branches of that rank too, with zeros, since files have one rank. No value is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import StoredLayer
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.original_names import CutLayer
from omni_convert.formats.views.base import (
    CheckpointView,
    KeptTensor,
    ViewedTensor,
    Zeros,
    dequantized_view,
    finite_part,
)
from omni_convert.formats.views.columns import SumOfVectors
from omni_convert.formats.views.opened import QuantizedCheckpoint, QuantizedLayer

__all__ = ["cut_quantized_layers", "joined_quantized_layers"]

BIAS = ".bias"


@dataclass(frozen=True)
class _Columns:
    """Columns `start` to `stop` of a layer."""

    layer: QuantizedLayer
    start: int
    stop: int

    def read(self, suffix: str, axis: int | None, start: int, stop: int) -> Tensor:
        """Rows of a canonical tensor, with the entries for these columns; all rows of one that has none."""
        found = finite_part(self.layer.read_tensor(suffix, start, stop), self.layer, suffix)
        if axis is None:
            return found
        entry = self.layer.shape[1] // found.shape[axis]
        return found.narrow(axis, self.start // entry, (self.stop - self.start) // entry).contiguous()


@dataclass(frozen=True)
class _BesideEachOther(ViewedTensor):
    """A canonical tensor of a layer that consists of columns of others.

    Attributes:
        axis: along which its entries stand for columns; None if it belongs to all of them
        rank_axis: along which its entries stand for directions of a branch; None if it belongs to none
        is_by_row: its rows are rows of the weight
        is_apart: each part has a branch of its own
    """

    spec: TensorSpec
    sources: tuple[str, ...]
    parts: Sequence[_Columns]
    suffix: str
    axis: int | None
    rank_axis: int | None
    is_by_row: bool
    is_apart: bool

    def read(self, start: int, stop: int) -> Tensor:
        rows = (start, stop) if self.is_by_row else (0, 0)
        is_branch = self.rank_axis is not None and self.is_apart
        parts = self.parts if self.axis is not None or is_branch else self.parts[:1]
        whole = self._joined([part.read(self.suffix, self.axis, *rows) for part in parts], is_branch)
        if self.rank_axis is not None:
            whole = _widened(whole, self.rank_axis, self.spec.shape[self.rank_axis])
        return whole if self.is_by_row or not self.spec.shape else whole[start:stop]

    def _joined(self, found: Sequence[Tensor], is_branch: bool) -> Tensor:
        if is_branch and self.axis is not None:
            diagonal: Tensor = torch.block_diag(*found)  # type: ignore[no-untyped-call]  # torch's
            return diagonal
        axis = self.rank_axis if is_branch else self.axis
        return found[0] if axis is None else torch.cat([*found], axis)


def _widened(tensor: Tensor, axis: int, size: int) -> Tensor:
    """A matrix with zeros behind its last entries along an axis."""
    missing = [*tensor.shape]
    missing[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], axis) if missing[axis] else tensor


def cut_quantized_layers(quantized: QuantizedCheckpoint, cuts: Sequence[CutLayer]) -> QuantizedCheckpoint:
    """The checkpoint with both parts of each such layer in its place; the same checkpoint if it holds none.

    Layers in formats that cannot be cut between columns stay.

    Args:
        cuts: patterns of layers of diffusers
    """
    plain = dequantized_view(quantized)
    made: dict[str, list[tuple[str, list[_Columns]]]] = {}
    biases: dict[str, list[ViewedTensor]] = {}
    for stem, layer in quantized.layers.items():
        halves = next(filter(None, (cut.parts_of(stem) for cut in cuts)), None)
        if halves is not None and layer.format.column_axes:
            rows, columns = layer.shape
            first, rest = halves
            made[stem] = [(first, [_Columns(layer, 0, rows)]), (rest, [_Columns(layer, rows, columns)])]
            bias = plain.get(f"{stem}{BIAS}")
            if bias is not None:
                zeros = Zeros(replace(bias, name=f"{first}{BIAS}"))
                biases[bias.name] = [zeros, KeptTensor(replace(bias, name=f"{rest}{BIAS}"), plain, bias.name)]
    return _with_layers(quantized, plain, made, biases) if made else quantized


def joined_quantized_layers(quantized: QuantizedCheckpoint, cuts: Sequence[CutLayer]) -> QuantizedCheckpoint:
    """The checkpoint with one layer in place of its parts; the same checkpoint if it holds none.

    Args:
        cuts: patterns of layers of diffusers

    Raises:
        CheckpointError: only one part is quantized, or what belongs to all columns differs between the parts.

    Returns:
        the checkpoint, in which all branches have twice the rank if the parts of a layer have one each
    """
    found = {stem: next(filter(None, (cut.layer_of(stem) for cut in cuts)), None) for stem in quantized.layers}
    wholes = dict.fromkeys(place[0] for place in found.values() if place is not None)
    if not wholes:
        return quantized
    plain = dequantized_view(quantized)
    made: dict[str, list[tuple[str, list[_Columns]]]] = {}
    biases: dict[str, list[ViewedTensor]] = {}
    rank = None
    for stem in wholes:
        first, rest = next(filter(None, (cut.parts_of(stem) for cut in cuts)))
        layers = _alike(quantized, stem, first, rest)
        made |= {first: [(stem, [_Columns(layer, 0, layer.shape[1]) for layer in layers])], rest: []}
        if any(not _is_same(*layers, suffix) for suffix in _branch(layers[0])):
            rank = sum(_rank(layer) for layer in layers)
        names = tuple(name for part in (first, rest) if (name := f"{part}{BIAS}") in plain)
        for name in names:
            spec = replace(plain[name], name=f"{stem}{BIAS}")
            biases[name] = [SumOfVectors(spec, plain, names)] if name == names[0] else []
    return _with_layers(quantized, plain, made, biases, rank)


def _alike(quantized: QuantizedCheckpoint, stem: str, first: str, rest: str) -> tuple[QuantizedLayer, QuantizedLayer]:
    """Both parts of a layer, which agree in everything that it has once."""
    why = None
    one, other = quantized.layers.get(first), quantized.layers.get(rest)
    if one is None or other is None:
        why = f"of '{first}' and '{rest}' only one is quantized"
    elif one.format.unshifted != other.format.unshifted:
        why = f"'{first}' and '{rest}' have several formats"
    elif (suffix := next((each for each in _shared(one) if not _is_same(one, other, each)), None)) is not None:
        why = f"'{first}' and '{rest}' have a {suffix} each, and one layer has one"
    if one is None or other is None or why is not None:
        raise CheckpointError(
            f"{quantized.checkpoint.path}: tensor '{stem}{WEIGHT}': cannot be renamed without a change: it would join "
            f"the columns of two layers: {why}; -m METHOD quantizes again"
        )
    return one, other


def _shared(layer: QuantizedLayer) -> Iterator[str]:
    """Tensors that a layer has once, for all columns."""
    others = layer.format.column_axes.keys() | layer.format.rank_axes.keys()
    return (suffix for suffix in layer.tensors if suffix not in others)


def _branch(layer: QuantizedLayer) -> Iterator[str]:
    """Tensors of a branch that belong to all columns."""
    return (suffix for suffix in layer.format.rank_axes if suffix not in layer.format.column_axes)


def _rank(layer: QuantizedLayer) -> int:
    return next(layer.tensors[suffix].shape[axis] for suffix, axis in layer.format.rank_axes.items())


def _is_same(one: QuantizedLayer, other: QuantizedLayer, suffix: str) -> bool:
    rows = one.tensors[suffix].shape[0] if one.tensors[suffix].rows_per_entry else 0
    return one.read_tensor(suffix, 0, rows).equal(other.read_tensor(suffix, 0, rows))


def _with_layers(
    quantized: QuantizedCheckpoint,
    plain: CheckpointView,
    made: Mapping[str, Sequence[tuple[str, Sequence[_Columns]]]],
    biases: Mapping[str, Sequence[ViewedTensor]],
    rank: int | None = None,
) -> QuantizedCheckpoint:
    """The checkpoint with other layers in place of some.

    Args:
        made: stem of each that goes → the stems of those in its place, with the columns that they consist of
        biases: name of each bias that goes → those in its place
        rank: of all branches, if those of parts are joined; None if they stay
    """
    tensors: list[ViewedTensor] = []
    layers: dict[str, StoredLayer] = {}
    kept: dict[str, str] = {}
    weights = {layer.stored.weight_name: stem for stem, layer in quantized.layers.items()}
    for name in plain:
        stem = weights.get(name)
        if stem is None:
            found = list(biases.get(name, [plain.tensor(name)]))
            tensors += found
            kept |= {each.spec.name: each.spec.name for each in found}
            continue
        layer = quantized.layers[stem]
        for new, parts in made.get(stem, [(stem, [_Columns(layer, 0, layer.shape[1])])]):
            fmt = layer.format.unshifted if stem in made else layer.format
            fmt = fmt if rank is None else fmt.with_rank(rank)
            shape = (layer.shape[0], sum(part.stop - part.start for part in parts))
            is_full_precision = layer.stored.is_full_precision
            layers[new] = StoredLayer(new, fmt, shape, is_full_precision=is_full_precision)
            tensors += _tensors_of(layers[new], parts, is_apart=rank is not None)
    view = CheckpointView(plain, tensors)
    stored = {stem: QuantizedLayer(view, layer, layer.format.layout(*layer.shape)) for stem, layer in layers.items()}
    return replace(quantized, checkpoint=view, layers=stored, kept=kept)


def _tensors_of(stored: StoredLayer, parts: Sequence[_Columns], *, is_apart: bool) -> Iterator[ViewedTensor]:
    """The canonical tensors of a new layer."""
    sources = tuple(part.layer.stored.weight_name for part in parts)
    for suffix, layout in stored.format.layout(*stored.shape).items():
        spec = TensorSpec(f"{stored.stem}.{suffix}", layout.dtype, layout.shape)
        axis, rank_axis = stored.format.column_axes.get(suffix), stored.format.rank_axes.get(suffix)
        yield _BesideEachOther(spec, sources, parts, suffix, axis, rank_axis, bool(layout.rows_per_entry), is_apart)
