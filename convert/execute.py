"""Carries out a plan: one tensor (or a tile of its rows) in memory at a time, everything written at its final place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omni_convert.convert.memory import anonymous_memory
from omni_convert.convert.plan import ComponentPlan, CopyStep, QuantizeStep
from omni_convert.formats.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import TILE_ELEMENTS, WeightRows, iterate_rows
from omni_convert.formats.safetensors_writer import SafetensorsWriter

__all__ = ["LayerResult", "Progress", "execute_component"]

#: Called with the number of source bytes that have been dealt with.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class LayerResult:
    """How close a quantized layer came: `relative_error` is ‖W - Ŵ‖ / ‖W‖ (Frobenius)."""

    name: str
    method: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass(frozen=True)
class CheckedRows:
    """Rows of a weight, refused when they hold NaN or Inf, which no scale can represent."""

    checkpoint: Checkpoint
    name: str
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.checkpoint[self.name].shape
        return out_features, in_features

    def read(self, start: int, stop: int) -> Tensor:
        rows = self.checkpoint.read_rows(self.name, start, stop).to(self.device)
        # A sum is finite unless an element is not, or the sum itself overflows: one cheap pass instead of two.
        if not math.isfinite(rows.sum(dtype=torch.float32)) and not torch.isfinite(rows).all():
            shard = self.checkpoint.weight_map[self.name]
            raise CheckpointError(
                f"{self.checkpoint.path}: {shard}: tensor '{self.name}': found NaN or Inf in rows {start} to "
                f"{stop - 1}, expected finite weights; repair the source, or keep the layer with --ignored-layers"
            )
        return rows


class Outputs(Mapping[str, SafetensorsWriter]):
    """All shards of a component, open for writing: tensor name → the writer of its shard."""

    def __init__(self, folder: Path, component: ComponentPlan, stack: ExitStack) -> None:
        self._writers: dict[str, SafetensorsWriter] = {}
        for file, specs in component.shards.files.items():
            writer = stack.enter_context(SafetensorsWriter(folder / file, specs))
            self._writers |= dict.fromkeys((spec.name for spec in specs), writer)

    def __getitem__(self, name: str) -> SafetensorsWriter:
        return self._writers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._writers)

    def __len__(self) -> int:
        return len(self._writers)


@contextmanager
def _opened(folder: Path, component: ComponentPlan) -> Iterator[Outputs]:
    with ExitStack() as stack:
        yield Outputs(folder, component, stack)


def execute_component(
    component: ComponentPlan, folder: Path, device: torch.device, progress: Progress
) -> tuple[list[LayerResult], int]:
    """Writes the shards of one component into `folder`.

    Returns:
        what became of each quantized layer, and the peak of `RssAnon` in bytes

    Raises:
        CheckpointError: the source is damaged or a weight is not finite.
        OutputError: the output cannot be written.
    """
    results: list[LayerResult] = []
    peak = 0
    with _opened(folder, component) as outputs:
        for step in component.steps:
            if isinstance(step, QuantizeStep):
                results += _quantize(step, component, outputs, device)
                progress(sum(weight.nbytes for weight in step.weights))
            else:
                _copy(step, component.checkpoint, outputs)
                progress(step.tensor.nbytes)
            peak = max(peak, anonymous_memory())
    return results, peak


def _quantize(
    step: QuantizeStep, component: ComponentPlan, outputs: Outputs, device: torch.device
) -> Iterator[LayerResult]:
    weights = [CheckedRows(component.checkpoint, spec.name, device) for spec in step.weights]
    fitted = step.format.fit(weights, step.inputs)
    constants = step.format.constants(fitted)
    for stem, weight, spec in zip(step.group.members, weights, step.weights, strict=True):
        for suffix, tensor in constants.items():
            outputs[f"{stem}.{suffix}"].write(f"{stem}.{suffix}", tensor.cpu())
        error = _quantize_weight(step, stem, weight, fitted, constants, outputs)
        written = sum(
            math.prod(layout.shape) * layout.dtype.itemsize for layout in step.format.layout(*weight.shape).values()
        )
        yield LayerResult(stem, component.method, spec.nbytes, written, error)


def _quantize_weight(
    step: QuantizeStep,
    stem: str,
    weight: WeightRows,
    fitted: object,
    constants: Mapping[str, Tensor],
    outputs: Outputs,
) -> float:
    """Quantizes and writes one weight tile by tile; returns its relative error."""
    layout = step.format.layout(*weight.shape)
    squared_error = squared_norm = 0.0
    for start, rows in iterate_rows(weight, step.format.row_multiple):
        tensors = step.format.quantize_rows(rows, fitted)
        for suffix, tensor in tensors.items():
            name = f"{stem}.{suffix}"
            outputs[name].write_rows(name, start // layout[suffix].rows_per_entry, tensor.cpu())
        original = rows.float()
        squared_norm += float(original.square().sum(dtype=torch.float64))
        difference = original.sub_(step.format.dequantize(tensors | dict(constants)))
        squared_error += float(difference.square_().sum(dtype=torch.float64))
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def _copy(step: CopyStep, checkpoint: Checkpoint, outputs: Outputs) -> None:
    """Writes a tensor as it is, in blocks of rows so that an embedding of gigabytes needs no gigabytes."""
    spec = step.tensor
    writer = outputs[spec.name]
    if len(spec.shape) == 0 or spec.elements <= TILE_ELEMENTS:
        writer.write(spec.name, checkpoint.read(spec.name).to(step.dtype))
        return
    rows = max(1, TILE_ELEMENTS * spec.shape[0] // spec.elements)
    for start in range(0, spec.shape[0], rows):
        tile = checkpoint.read_rows(spec.name, start, min(start + rows, spec.shape[0]))
        writer.write_rows(spec.name, start, tile.to(step.dtype))
