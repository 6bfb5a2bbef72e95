"""A checkpoint whose tensors are changed by LoRA files, rows at a time, when somebody reads them.

Changes are applied in their order, in float64, and the result is rounded to float32 once. So the numbers do not depend
on who computes which rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.views.base import CheckpointView, KeptTensor, ViewedTensor
from omni_convert.formats.views.lora_changes import Change

__all__ = ["PlacedChange", "baked_view"]

# How much of a weight is in memory while the norms of its columns are computed, in elements.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class PlacedChange:
    """A change of consecutive rows of a tensor, which may be some of those that the change was trained for.

    Attributes:
        change: of a weight that may join several tensors
        first: the tensor's first row that changes
        start: the row of the change that belongs to it
        count: how many rows change
    """

    change: Change
    first: int
    start: int
    count: int

    def widened(self, low: int, high: int) -> tuple[int, int]:
        """The rows that are needed to change rows `low` to `high`: blocks of rows change together."""
        end, height = self.first + self.count, self.change.height
        if low < end and high > self.first:
            if low > self.first:
                low -= (low - self.first) % height
            if high < end:
                high += (self.first - high) % height
        return low, high

    def applied(self, rows: Tensor, low: int, chunks: Iterator[Tensor]) -> Tensor:
        """Changes its rows among those from `low` on; both float64 [rows, in]."""
        begin, end = max(low, self.first), min(low + len(rows), self.first + self.count)
        if begin >= end:
            return rows
        offset = self.start - self.first
        changed = self.change.apply(rows[begin - low : end - low], begin + offset, chunks)
        return torch.cat([rows[: begin - low], changed, rows[end - low :]])


@dataclass(frozen=True)
class _Baked(ViewedTensor):
    """A tensor with its changes, float32."""

    spec: TensorSpec
    checkpoint: Checkpoint
    changes: Sequence[PlacedChange]

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the name
        return (self.spec.name,)

    def read(self, start: int, stop: int) -> Tensor:
        return self._changed(start, stop).float().reshape(stop - start, *self.spec.shape[1:])

    def _changed(self, start: int, stop: int) -> Tensor:
        """Float64 [stop - start, elements of a row]."""
        low, high = start, stop
        while (wider := self._widened(low, high)) != (low, high):
            low, high = wider
        rows = self.checkpoint.read_rows(self.spec.name, low, high).double().reshape(high - low, -1)
        for index, placed in enumerate(self.changes):
            rows = placed.applied(rows, low, self._chunks_before(index))
        return rows[start - low : stop - low]

    def _widened(self, low: int, high: int) -> tuple[int, int]:
        for placed in self.changes:
            low, high = placed.widened(low, high)
        return low, high

    def _chunks_before(self, index: int) -> Iterator[Tensor]:
        """The whole tensor with the changes before one of them, some rows at a time."""
        before = replace(self, changes=self.changes[:index])
        rows = self.spec.shape[0]
        step = max(1, CHUNK_ELEMENTS * rows // max(1, self.spec.elements))
        for start in range(0, rows, step):
            yield before._changed(start, min(start + step, rows))  # noqa: SLF001  # its own class


def baked_view(checkpoint: Checkpoint, changes: Mapping[str, Sequence[PlacedChange]]) -> CheckpointView:
    """The checkpoint with these changes, by name of the tensor; it has every tensor that is named."""
    earlier = checkpoint.storage if isinstance(checkpoint, CheckpointView) else {}
    storage = {name: earlier.get(name, checkpoint[name].dtype) for name in changes}
    tensors: list[ViewedTensor] = [
        _Baked(TensorSpec(name, torch.float32, spec.shape), checkpoint, tuple(changes[name]))
        if name in changes
        else KeptTensor(spec, checkpoint, name)
        for name, spec in checkpoint.items()
    ]
    return CheckpointView(checkpoint, tensors, earlier | storage)
