"""A quantized checkpoint under other names, where a layer may consist of rows of others: split, joined, reordered.

Codes and scales of rows go with their rows, those of blocks of rows with whole blocks, and what belongs to a whole
weight with every part of it. No value is changed; a tensor that would need a change is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.dialects.base import StoredLayer
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.views.base import CheckpointView, ViewedTensor, dequantized_view, finite_part
from omni_convert.formats.views.opened import QuantizedCheckpoint, QuantizedLayer
from omni_convert.formats.views.renamed import renamed_view

__all__ = ["renamed_layers"]


@dataclass(frozen=True)
class _Part:
    """Consecutive rows of a layer."""

    layer: QuantizedLayer
    start: int
    stop: int


@dataclass(frozen=True)
class _Rows(ViewedTensor):
    """A canonical tensor whose rows are those of layers' tensors, one part after the other."""

    spec: TensorSpec
    sources: tuple[str, ...]
    parts: Sequence[_Part]
    suffix: str
    layout: TensorLayout

    def read(self, start: int, stop: int) -> Tensor:
        if not self.layout.rows_per_entry:
            whole = self._finite(self.parts[0], 0, 0)
            return whole[start:stop] if self.spec.shape else whole
        found, first = [], 0
        for part in self.parts:
            rows = self.layout.entries_of(part.start, part.stop)
            low, high = max(start, first), min(stop, first + rows.stop - rows.start)
            if low < high:
                offset = rows.start - first
                found.append(self._finite(part, low + offset, high + offset))
            first += rows.stop - rows.start
        return found[0] if len(found) == 1 else torch.cat(found)

    def _finite(self, part: _Part, start: int, stop: int) -> Tensor:
        return finite_part(part.layer.read_tensor(self.suffix, start, stop), part.layer, self.suffix)


def renamed_layers(
    quantized: QuantizedCheckpoint, runs: Mapping[str, Sequence[Run]], shapes: Mapping[str, tuple[int, ...]]
) -> QuantizedCheckpoint:
    """The checkpoint with these tensors.

    Args:
        runs: of each tensor: rows of the tensors of `dequantized_view`
        shapes: what each should be

    Raises:
        CheckpointError: a tensor has another size, or what it consists of cannot be one layer.
    """
    parts = {name: _parts(quantized, name, runs[name], shape) for name, shape in shapes.items()}
    plain = dequantized_view(quantized)
    renamed = renamed_view(plain, runs, shapes)
    tensors: list[ViewedTensor] = []
    layers: dict[str, StoredLayer] = {}
    kept: list[str] = []
    for name, spec in renamed.items():
        if not parts[name]:
            tensors.append(renamed.tensor(name))
            kept.append(name)
            continue
        stem = name.removesuffix(WEIGHT)
        first = parts[name][0].layer
        is_full_precision = first.stored.is_full_precision
        if any(part.layer.stored.is_full_precision is not is_full_precision for part in parts[name]):
            raise _refusal(quantized, name, "it would join layers of which only some are multiplied in full precision")
        shape = (spec.shape[0], spec.shape[1])
        layers[stem] = StoredLayer(stem, first.format, shape, is_full_precision=is_full_precision)
        tensors += _tensors_of(quantized, layers[stem], parts[name])
    view = CheckpointView(plain, tensors)
    stored = {stem: QuantizedLayer(view, layer, layer.format.layout(*layer.shape)) for stem, layer in layers.items()}
    return replace(quantized, checkpoint=view, layers=stored, kept={name: name for name in kept})


def _parts(quantized: QuantizedCheckpoint, name: str, runs: Sequence[Run], shape: tuple[int, ...]) -> Sequence[_Part]:
    """The parts of quantized layers that a tensor consists of; nothing if it is not quantized.

    Raises:
        CheckpointError: only some of its parts are quantized, or it is no weight of a linear.
    """
    found = [(run.source, _part(quantized, run)) for run in runs]
    parts = [part for _, part in found if part is not None]
    if not parts:
        return ()
    rows = f"rows of '{parts[0].layer.stem}', which is quantized"
    if len(parts) < len(found):
        other = next(source for source, part in found if part is None)
        raise _refusal(quantized, name, f"it would join {rows}, and of '{other}', which is not")
    if not name.endswith(WEIGHT):
        raise _refusal(quantized, name, f"it would consist of {rows}, and is not called NAME{WEIGHT}")
    if len(shape) != 2:
        raise _refusal(quantized, name, f"it would consist of {rows}, and is no matrix but {list(shape)}")
    return parts


def _part(quantized: QuantizedCheckpoint, run: Run) -> _Part | None:
    """The part of a quantized layer that a run holds, or None."""
    layer = quantized.layers.get(run.source.removesuffix(WEIGHT)) if run.source.endswith(WEIGHT) else None
    return None if layer is None else _Part(layer, run.start, run.start + run.count)


def _tensors_of(quantized: QuantizedCheckpoint, stored: StoredLayer, parts: Sequence[_Part]) -> list[ViewedTensor]:
    """The canonical tensors of a new layer."""
    name = f"{stored.stem}{WEIGHT}"
    sources = tuple(dict.fromkeys(f"{part.layer.stem}{WEIGHT}" for part in parts))
    if any(part.layer.format != stored.format for part in parts):
        raise _refusal(quantized, name, "it would consist of layers in several formats")
    tensors: list[ViewedTensor] = []
    for suffix, layout in stored.format.layout(*stored.shape).items():
        if layout.rows_per_entry:
            _check_cuts(quantized, name, parts, layout.rows_per_entry)
        else:
            _check_alike(quantized, name, parts, suffix)
        spec = TensorSpec(f"{stored.stem}.{suffix}", layout.dtype, layout.shape)
        tensors.append(_Rows(spec, sources, parts, suffix, layout))
    return tensors


def _check_cuts(quantized: QuantizedCheckpoint, name: str, parts: Sequence[_Part], height: int) -> None:
    """Blocks of rows stay whole; the last one of the new layer may be short, if it was."""
    for part in parts:
        is_end = part is parts[-1] and part.stop == part.layer.shape[0]
        if part.start % height or (part.stop % height and not is_end):
            cut = f"rows {part.start} to {part.stop - 1} of '{part.layer.stem}', whose scales are of {height} rows each"
            raise _refusal(quantized, name, f"it would consist of {cut}")


def _check_alike(quantized: QuantizedCheckpoint, name: str, parts: Sequence[_Part], suffix: str) -> None:
    first = parts[0].layer
    for part in parts[1:]:
        if part.layer is not first and not part.layer.read_tensor(suffix, 0, 0).equal(first.read_tensor(suffix, 0, 0)):
            other = part.layer.stem
            raise _refusal(quantized, name, f"it would join '{first.stem}' and '{other}', whose {suffix} differ")


def _refusal(quantized: QuantizedCheckpoint, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{quantized.checkpoint.path}: tensor '{name}': cannot be renamed without a change: {why}; "
        "-m METHOD quantizes again"
    )
