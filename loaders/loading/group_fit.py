"""Fits the scales that a fused group shares, when its first member is quantized while a model loads.

The libraries hand over one weight at a time. The other members are read from the files, in tiles. The result is that of
a conversion: a runtime that fuses the members finds one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.rows import TensorRows, WeightRows
from omni_convert.loaders.loading.select import PlannedLayer

__all__ = ["GroupFits"]


@dataclass(frozen=True)
class _CastRows:
    """Rows in the dtype in which the model is loaded, so that scales are fitted to the numbers that are quantized."""

    rows: WeightRows
    like: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    def read(self, start: int, stop: int) -> Tensor:
        return self.rows.read(start, stop).to(device=self.like.device, dtype=self.like.dtype)


class GroupFits:
    """Quantizes layers one by one with the scales of their groups. Several threads may call it."""

    def __init__(self, checkpoint: Checkpoint | None = None, names: Mapping[str, str] | None = None) -> None:
        """Starts with no group fitted.

        Args:
            checkpoint: the model's weights, open; without it, each layer gets scales of its own
            names: name of a tensor in the model → in the files, where they differ
        """
        self._checkpoint = checkpoint
        self._names = dict(names or {})
        self._fitted: dict[str, Any] = {}
        self._pending: dict[str, set[str]] = {}
        self._lock = Lock()

    def quantize(self, stem: str, weight: Tensor, planned: PlannedLayer) -> dict[str, Tensor]:
        """The format's tensors of a weight [out, in], on its device.

        Raises:
            CheckpointError: another member of the group cannot be read.
        """
        with self._lock:
            fitted = self._fit(stem, weight, planned)
        tensors = planned.format.quantize_fitted(weight, fitted)
        # Each layer gets its own copy, because libraries treat a shared tensor as tied weights.
        own = {suffix: tensor.clone() for suffix, tensor in planned.format.constants(fitted).items()}
        return {suffix: tensor.to(weight.device) for suffix, tensor in (tensors | own).items()}

    def _fit(self, stem: str, weight: Tensor, planned: PlannedLayer) -> Any:
        group = planned.group
        if len(group.members) == 1 or self._checkpoint is None:
            return planned.format.fit([TensorRows(weight)], planned.inputs)
        if group.runtime_name not in self._fitted:
            rows = [TensorRows(weight) if member == stem else self._rows(member, weight) for member in group.members]
            self._fitted[group.runtime_name] = planned.format.fit(rows, planned.inputs)
            self._pending[group.runtime_name] = set(group.members)
        fitted = self._fitted[group.runtime_name]
        self._pending[group.runtime_name].discard(stem)
        if not self._pending[group.runtime_name]:
            del self._fitted[group.runtime_name], self._pending[group.runtime_name]
        return fitted

    def _rows(self, stem: str, like: Tensor) -> WeightRows:
        """The weight of another member of the group."""
        assert self._checkpoint is not None
        name = self._names.get(f"{stem}.weight", f"{stem}.weight")
        if name not in self._checkpoint:
            raise CheckpointError(
                f"{self._checkpoint.path}: {name} is missing, expected it beside the layers that it is fused with"
            )
        return _CastRows(self._checkpoint.rows(name), like)
