"""The result of converting a component, with the error of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from omni_convert.convert.execution.journal import Record
from omni_convert.convert.plan.component_plan import ComponentPlan

__all__ = ["ComponentResult", "LayerResult", "layer_results"]


@dataclass(frozen=True)
class LayerResult:
    """The size and error of a quantized layer: `relative_error` is ‖W - Ŵ‖ / ‖W‖ (Frobenius).

    The error is measured over all rows of a weight of up to a million elements, and over one row in 32 of others.
    """

    name: str
    method: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass(frozen=True)
class ComponentResult:
    """The result of converting a component.

    Attributes:
        layers: its quantized layers
        sha256: of each file of weights
        peak_memory: largest `RssAnon` seen, bytes
    """

    layers: list[LayerResult]
    sha256: dict[str, str]
    peak_memory: int


def layer_results(component: ComponentPlan, records: Mapping[str, list[Record]]) -> list[LayerResult]:
    """Computes the result of each layer from the records of each weight's tiles."""
    results = []
    for step in component.quantize_steps:
        for stem, weight in zip(step.group.members, step.weights, strict=True):
            error = math.fsum(record.squared_error for record in records[weight.name])
            norm = math.fsum(record.squared_norm for record in records[weight.name])
            layouts = step.layout(weight).values()
            written = sum(math.prod(layout.shape) * layout.dtype.itemsize for layout in layouts)
            relative = math.sqrt(error / norm) if norm else 0.0
            results.append(LayerResult(stem, step.format.method, weight.nbytes, written, relative))
    return results
