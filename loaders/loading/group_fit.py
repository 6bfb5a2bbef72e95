"""What the members of a fused group share, found when the first of them is quantized while a model loads.

The libraries hand over one weight at a time. The others of its group are read from the files, in tiles, so that the
result is what a conversion gives: a runtime that fuses the members finds one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.rows import TensorRows, WeightRows

__all__ = ["GroupFits", "PlannedLayer"]


@dataclass(frozen=True)
class PlannedLayer:
    """A layer to quantize while loading, and those with which a runtime fuses it."""

    format: QuantizingFormat
    group: LayerGroup


@dataclass(frozen=True)
class _CastRows:
    """Rows in the dtype in which the model is loaded: what is fitted is what is quantized."""

    rows: WeightRows
    like: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    def read(self, start: int, stop: int) -> Tensor:
        return self.rows.read(start, stop).to(device=self.like.device, dtype=self.like.dtype)


class GroupFits:
    """Quantizes layers one by one, with the scales of their groups; may be called from several threads."""

    def __init__(self, files: Sequence[str | Path] = (), names: Mapping[str, str] | None = None) -> None:
        """Opens the files of the model; their headers alone are read.

        Args:
            files: of the model; the scales of a group are shared only if they are .safetensors
            names: name of a tensor in the model → in the files, where they differ
        """
        paths = [Path(file) for file in files]
        is_readable = bool(paths) and all(path.suffix == ".safetensors" for path in paths)
        opened = {path.name: SafetensorsFile(path) for path in paths} if is_readable else {}
        self._checkpoint = Checkpoint(paths[0].parent, opened) if opened else None
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
        # No two layers may hold one tensor: libraries take that for tied weights.
        own = {suffix: tensor.clone() for suffix, tensor in planned.format.constants(fitted).items()}
        return {suffix: tensor.to(weight.device) for suffix, tensor in (tensors | own).items()}

    def close(self) -> None:
        """Forgets the files."""
        if self._checkpoint is not None:
            self._checkpoint.close()
        self._checkpoint = None

    def _fit(self, stem: str, weight: Tensor, planned: PlannedLayer) -> Any:
        group = planned.group
        if len(group.members) == 1 or self._checkpoint is None:
            return planned.format.fit([TensorRows(weight)], None)
        if group.runtime_name not in self._fitted:
            rows = [TensorRows(weight) if member == stem else self._rows(member, weight) for member in group.members]
            self._fitted[group.runtime_name] = planned.format.fit(rows, None)
            self._pending[group.runtime_name] = set(group.members)
        fitted = self._fitted[group.runtime_name]
        self._pending[group.runtime_name].discard(stem)
        if not self._pending[group.runtime_name]:
            del self._fitted[group.runtime_name], self._pending[group.runtime_name]
        return fitted

    def _rows(self, stem: str, like: Tensor) -> WeightRows:
        """Another member's weight."""
        assert self._checkpoint is not None
        name = self._names.get(f"{stem}.weight", f"{stem}.weight")
        if name not in self._checkpoint:
            raise CheckpointError(
                f"{self._checkpoint.path}: {name} is missing, expected it beside the layers that it is fused with"
            )
        return _CastRows(self._checkpoint.rows(name), like)
