"""A checkpoint with low-rank updates (LoRA) added to its weights, rows at a time, when somebody reads them.

    W' = W + sum of scale * up @ down        and, where a file has them, bias' = bias + scale * update

Sums are taken in float64 and rounded to float32 once, so that they do not depend on who computes which rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.views.base import CheckpointView, KeptTensor, ViewedTensor

__all__ = ["LowRank", "Update", "baked_view"]


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a weight.

    Attributes:
        down: any float dtype [rank, in], as it was trained
        up: [out, rank]; the rows of a convolution are flat here
        scale: strength times alpha / rank
    """

    down: Tensor
    up: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> Tensor:
        """Float64 [rows, in]."""
        return (self.up[start:stop].double() @ self.down.double()) * self.scale


@dataclass(frozen=True)
class Update:
    """An update of a tensor as a whole, such as a bias.

    Attributes:
        difference: any float dtype, of the tensor's shape
    """

    difference: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> Tensor:
        """Float64, flat after the first dimension."""
        return self.difference[start:stop].double().flatten(1 if self.difference.dim() > 1 else 0) * self.scale


@dataclass(frozen=True)
class _Baked(ViewedTensor):
    """A tensor with its updates added, float32."""

    spec: TensorSpec
    checkpoint: Checkpoint
    added: Sequence[LowRank | Update]

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the name
        return (self.spec.name,)

    def read(self, start: int, stop: int) -> Tensor:
        rows = self.checkpoint.read_rows(self.spec.name, start, stop).double()
        for each in self.added:
            rows += each.rows(start, stop).view_as(rows)
        return rows.float()


def baked_view(checkpoint: Checkpoint, added: Mapping[str, Iterable[LowRank | Update]]) -> CheckpointView:
    """The checkpoint with these updates, by name of the tensor; it has every tensor that is named."""
    earlier = checkpoint.storage if isinstance(checkpoint, CheckpointView) else {}
    storage = {name: earlier.get(name, checkpoint[name].dtype) for name in added}
    tensors: list[ViewedTensor] = [
        _Baked(TensorSpec(name, torch.float32, spec.shape), checkpoint, tuple(added[name]))
        if name in added
        else KeptTensor(spec, checkpoint, name)
        for name, spec in checkpoint.items()
    ]
    return CheckpointView(checkpoint, tensors, earlier | storage)
