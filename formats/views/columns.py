"""Layers of diffusers that a reader holds as two, each with some of the columns: cut for it, and joined again.

NAME.weight [out, in]  ◄──►  FIRST.weight [out, out] and REST.weight [out, in - out]
NAME.bias              ◄──►  REST.bias, and a FIRST.bias of zeros; joined, both are added
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.original_names import CutLayer
from omni_convert.formats.views.base import CheckpointView, KeptTensor, ViewedTensor, Zeros

__all__ = ["CutPart", "SumOfVectors", "cut_layers", "joined_layers"]

BIAS = ".bias"


@dataclass(frozen=True)
class CutPart:
    """One of the layers into which a layer of diffusers is cut.

    Attributes:
        layer: that layer
        columns: the first of its columns, and the one after the last
    """

    layer: str
    columns: tuple[int, int]


@dataclass(frozen=True)
class _SomeColumns(ViewedTensor):
    """Columns `start` to `stop` of a matrix."""

    spec: TensorSpec
    checkpoint: Checkpoint
    source: str
    start: int
    stop: int

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the name
        return (self.source,)

    def read(self, start: int, stop: int) -> Tensor:
        return self.checkpoint.read_rows(self.source, start, stop)[:, self.start : self.stop].contiguous()


@dataclass(frozen=True)
class _BesideEachOther(ViewedTensor):
    """The columns of several matrices, in the dtype of the first."""

    spec: TensorSpec
    checkpoint: Checkpoint
    sources: tuple[str, ...]

    def read(self, start: int, stop: int) -> Tensor:
        return torch.cat([self.checkpoint.read_rows(name, start, stop).to(self.spec.dtype) for name in self.sources], 1)


@dataclass(frozen=True)
class SumOfVectors(ViewedTensor):
    """The sum of vectors, computed in float32."""

    spec: TensorSpec
    checkpoint: Checkpoint
    sources: tuple[str, ...]

    def read(self, start: int, stop: int) -> Tensor:
        parts = [self.checkpoint.read_rows(name, start, stop).float() for name in self.sources]
        return torch.stack(parts).sum(0).to(self.spec.dtype)


def cut_layers(checkpoint: Checkpoint, cuts: Sequence[CutLayer]) -> tuple[Checkpoint, dict[str, CutPart]]:
    """The checkpoint with both parts of each such layer in its place, and part → what it is of.

    Args:
        cuts: patterns of layers of diffusers

    Raises:
        CheckpointError: a weight is no matrix.
    """
    tensors: list[ViewedTensor] = []
    parts: dict[str, CutPart] = {}
    storage = _storage(checkpoint)
    for name, spec in checkpoint.items():
        stem, _, leaf = name.rpartition(".")
        halves = next(filter(None, (cut.parts_of(stem) for cut in cuts)), None)
        if halves is None or f".{leaf}" not in (WEIGHT, BIAS):
            tensors.append(KeptTensor(spec, checkpoint, name))
            continue
        first, rest = (replace(spec, name=f"{half}.{leaf}") for half in halves)
        if f".{leaf}" == BIAS:
            tensors += [Zeros(first), KeptTensor(rest, checkpoint, name)]
        else:
            rows, columns = _sizes(checkpoint, spec)
            for half, part, (start, stop) in zip(halves, (first, rest), ((0, rows), (rows, columns)), strict=True):
                cut = replace(part, shape=(rows, stop - start))
                tensors.append(_SomeColumns(cut, checkpoint, name, start, stop))
                parts[half] = CutPart(stem, (start, stop))
        storage |= {part.name: storage[name] for part in (first, rest) if name in storage}
    return (CheckpointView(checkpoint, tensors, storage), parts) if parts else (checkpoint, {})


def joined_layers(checkpoint: Checkpoint, cuts: Sequence[CutLayer]) -> Checkpoint:
    """The checkpoint with one layer in place of its parts; the same checkpoint if it holds none.

    Args:
        cuts: patterns of layers of diffusers

    Raises:
        CheckpointError: a weight is no matrix, or its parts have several numbers of rows.
    """
    stems = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint)
    layers = {stem: cut.parts_of(stem) for cut in cuts for stem, _ in filter(None, map(cut.layer_of, stems))}
    whole = {part: (stem, parts) for stem, parts in layers.items() if parts is not None for part in parts}
    if not whole:
        return checkpoint
    tensors: list[ViewedTensor] = []
    storage = _storage(checkpoint)
    for name, spec in checkpoint.items():
        part, _, leaf = name.rpartition(".")
        if part not in whole or f".{leaf}" not in (WEIGHT, BIAS):
            tensors.append(KeptTensor(spec, checkpoint, name))
            continue
        stem, halves = whole[part]
        sources = tuple(source for half in halves if (source := f"{half}.{leaf}") in checkpoint)
        if sources[0] != name:  # it came with the first
            continue
        joined = replace(spec, name=f"{stem}.{leaf}")
        if f".{leaf}" == BIAS:
            tensors.append(SumOfVectors(joined, checkpoint, sources))
        else:
            sizes = [_sizes(checkpoint, checkpoint[source]) for source in sources]
            if len({rows for rows, _ in sizes}) > 1:
                found = f"found {sizes[0][0]} and {sizes[1][0]} rows in '{sources[0]}' and '{sources[1]}'"
                raise CheckpointError(f"{checkpoint.path}: {found}, expected as many in both")
            shape = (sizes[0][0], sum(columns for _, columns in sizes))
            tensors.append(_BesideEachOther(replace(joined, shape=shape), checkpoint, sources))
        storage |= {joined.name: storage[name]} if name in storage else {}
    return CheckpointView(checkpoint, tensors, storage)


def _sizes(checkpoint: Checkpoint, spec: TensorSpec) -> tuple[int, int]:
    if len(spec.shape) != 2:
        raise CheckpointError(f"{checkpoint.path}: tensor '{spec.name}': found {list(spec.shape)}, expected a matrix")
    return spec.shape[0], spec.shape[1]


def _storage(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    return dict(checkpoint.storage) if isinstance(checkpoint, CheckpointView) else {}
