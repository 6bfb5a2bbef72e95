"""A checkpoint under other names, where a tensor may consist of rows of several others: split, joined, reordered.

What a conversion of names does to tensors is found by giving it *row numbers* in place of them: a tensor of shape
[rows, ...] is stood for by its rows' numbers [rows, 1, ...], counted through the whole checkpoint. What comes out tells
for each new tensor which rows it consists of. No weight is read, whatever the size of the model.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, Run, TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.views.base import CheckpointView, ViewedTensor

__all__ = ["renamed_view", "trace_rows"]

# Dtypes that float32 holds without a change.
WIDENED = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class _Joined(ViewedTensor):
    """Runs of rows, one after the other."""

    spec: TensorSpec
    checkpoint: Checkpoint
    runs: Sequence[Run]

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the runs
        return tuple(dict.fromkeys(run.source for run in self.runs))

    def read(self, start: int, stop: int) -> Tensor:
        if not self.spec.shape:
            return self.checkpoint.read(self.runs[0].source).reshape(())
        parts, first = [], 0
        for run in self.runs:
            low, high = max(start, first), min(stop, first + run.count)
            if low < high:
                offset = run.start - first
                parts.append(self.checkpoint.read_rows(run.source, low + offset, high + offset))
            first += run.count
        if len(parts) > 1:
            parts = [torch.cat([part.flatten(1 if part.dim() > 1 else 0).to(self.spec.dtype) for part in parts])]
        return parts[0].to(self.spec.dtype).reshape(stop - start, *self.spec.shape[1:])


@dataclass(frozen=True)
class _Reshaped(ViewedTensor):
    """A whole tensor in another shape."""

    spec: TensorSpec
    checkpoint: Checkpoint
    source: str

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the name
        return (self.source,)

    def read(self, start: int, stop: int) -> Tensor:
        return self.checkpoint.read(self.source).reshape(self.spec.shape)[start:stop]


def trace_rows(
    specs: Mapping[str, TensorSpec], convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, list[Run]]:
    """New name → the rows of which a conversion makes the tensor.

    Args:
        convert: maps a state dict to another; it may split, join and permute along the first dimension, and reshape a
            vector

    Raises:
        CheckpointError: it does more than that with a tensor, which is named.
    """
    names, bounds, total = [], [], 0
    numbers: dict[str, Tensor] = {}
    for name, spec in specs.items():
        rows = spec.shape[0] if spec.shape else 1
        counted = torch.arange(total, total + rows)
        numbers[name] = counted.reshape([rows] + [1] * (len(spec.shape) - 1)) if spec.shape else counted[0]
        names.append(name)
        bounds.append(total)
        total += rows

    def is_whole(flat: Tensor) -> bool:
        """Whether these are the numbers of all elements of a vector, in order."""
        shape = specs[names[bisect_right(bounds, int(flat[0])) - 1]].shape
        return shape == (len(flat),) and bool((flat.diff() == 1).all())

    def runs_of(name: str, rows: Tensor) -> list[Run]:
        flat = rows.reshape(-1)
        is_traced = rows.dtype is torch.int64 and bool(len(flat)) and 0 <= int(flat.min()) <= int(flat.max()) < total
        if not is_traced or not (not rows.dim() or len(rows) == len(flat) or is_whole(flat)):
            raise CheckpointError(
                f"tensor '{name}': found that diffusers computes it, expected rows of the file's tensors; save the "
                "model with diffusers first"
            )
        edges = (flat.diff() != 1).nonzero().flatten() + 1
        starts = torch.cat([torch.tensor([0]), edges]).tolist()
        found = []
        for start, stop in zip(starts, [*starts[1:], len(flat)], strict=True):
            first, count = int(flat[start]), stop - start
            while count:  # numbers go on from one tensor to the next
                index = bisect_right(bounds, first) - 1
                end = bounds[index + 1] if index + 1 < len(bounds) else total
                taken = min(count, end - first)
                found.append(Run(names[index], first - bounds[index], taken))
                first, count = first + taken, count - taken
        return found

    return {name: runs_of(name, rows) for name, rows in convert(numbers).items()}


def renamed_view(
    checkpoint: Checkpoint,
    runs: Mapping[str, Sequence[Run]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    widens: bool = False,
) -> CheckpointView:
    """The checkpoint with tensors that are made of rows of its own.

    Args:
        runs: of each tensor, from `trace_rows`
        shapes: what each should be; columns may have other dimensions in the file, not another number, and a whole
            tensor may have any, if it is a vector in the file or should be one
        widens: floats of several dtypes become float32 together

    Raises:
        CheckpointError: a tensor has another size, or several dtypes.
    """
    earlier = checkpoint.storage if isinstance(checkpoint, CheckpointView) else {}
    tensors: list[ViewedTensor] = []
    storage: dict[str, torch.dtype] = {}
    for name, shape in shapes.items():
        specs = [checkpoint[run.source] for run in runs[name]]
        rows = sum(run.count for run in runs[name])
        columns = {math.prod(spec.shape[1:]) for spec in specs}
        dtype = _dtype_of({spec.dtype for spec in specs}, widens=widens)
        is_reshaped = len(runs[name]) == 1 and _is_vector_reshaped(runs[name][0], specs[0], shape)
        if not is_reshaped and (rows != (shape[0] if shape else 1) or columns != {math.prod(shape[1:])}):
            sizes = ", ".join(f"{list(spec.shape)} of '{spec.name}'" for spec in specs[:2])
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}': found {rows} rows from {sizes}, expected {list(shape)} by the "
                "config.json beside it; is it that of this model?"
            )
        if dtype is None:
            found = ", ".join(f"{DTYPE_NAMES[spec.dtype]} of '{spec.name}'" for spec in specs)
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}': found rows in {found}, expected one dtype; cast the model to one"
            )
        spec = TensorSpec(name, dtype, shape)
        reshaped = _Reshaped(spec, checkpoint, specs[0].name)
        tensors.append(reshaped if is_reshaped else _Joined(spec, checkpoint, tuple(runs[name])))
        if specs[0].name in earlier:
            storage[name] = earlier[specs[0].name]
    return CheckpointView(checkpoint, tensors, storage)


def _is_vector_reshaped(run: Run, spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Whether a run is a whole tensor of another shape, of which one is that of a vector."""
    is_whole = run.start == 0 and run.count == (spec.shape[0] if spec.shape else 1)
    is_vector = any(sum(size > 1 for size in each) == 1 for each in (spec.shape, shape))
    has_other_rows = bool(shape and spec.shape) and shape[0] != spec.shape[0]
    return is_whole and is_vector and has_other_rows and spec.elements == math.prod(shape)


def _dtype_of(dtypes: set[torch.dtype], *, widens: bool) -> torch.dtype | None:
    """The one dtype, or what holds the numbers of all without a change."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return torch.float32 if widens and dtypes <= WIDENED else None
