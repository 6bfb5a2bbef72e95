"""Reports: the plan of a conversion, and its result, as data and as lines for a terminal."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_convert.convert.execution.component_result import LayerResult
from omni_convert.convert.output.remote_folder import RemoteFolder
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.plan import Plan
from omni_convert.convert.plan.steps import KeptLayer, QuantizeStep
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES

__all__ = ["ConversionReport", "conversion_report", "conversion_rows", "plan_report", "size_text"]

#: Above this relative error, almost nothing of a weight is left. Every format here stays far below it with weights in
#: its range: four bits lose about 12 %.
LARGEST_ERROR = 0.5
#: How weights were rounded → what the closing table says about it.
ROUNDINGS = {
    "nearest": "",
    "gptq": "GPTQ, which makes errors of outputs smaller, and those of weights larger, as shown above",
    "auto": "GPTQ where it makes errors of outputs smaller; those of weights are then larger, as shown above",
}
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


@dataclass(frozen=True)
class ConversionReport:
    """The result of a conversion, and its cost.

    Attributes:
        layers: every quantized layer, named `component.layer`
        kept: layers that the runtime could run quantized but that stay as they are, with the reason
        notes: how the recipe was interpreted, and what to watch
        bytes_before, bytes_after: size of the weights of the quantized components
        seconds: time of the conversion without calibration
        calibration_seconds: time of the calibration; None if no prompts were run
        peak_memory: largest `RssAnon` in bytes; None if an earlier run had finished the output
        has_lora: a LoRA was baked in
        rounding: how weights were rounded: `nearest`, `gptq`, or `auto`
    """

    output: Path | RemoteFolder
    layers: tuple[LayerResult, ...]
    kept: tuple[KeptLayer, ...]
    notes: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    calibration_seconds: float | None
    peak_memory: int | None
    has_lora: bool = False
    rounding: str = "nearest"

    @property
    def median_error(self) -> float:
        return statistics.median(layer.relative_error for layer in self.layers)

    @property
    def worst(self) -> LayerResult:
        return max(self.layers, key=lambda layer: layer.relative_error)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Results that were written but are probably not wanted."""
        lost = [layer for layer in self.layers if not layer.relative_error <= LARGEST_ERROR]
        if not lost:
            return ()
        worst = self.worst
        scale = " (is the LoRA's SCALE too large?)" if self.has_lora else ""
        others = f", and {len(lost) - 1} more above {LARGEST_ERROR}" if len(lost) > 1 else ""
        return (
            f"{worst.name}: found a relative error of {worst.relative_error:.3g}{others}, far more than {worst.method} "
            f"causes: the weights lie outside its range, or far from others that share their scale{scale}; "
            "--ignored-layers leaves layers as they are",
        )

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {**asdict(self), "output": str(self.output), "warnings": self.warnings}


def conversion_report(report: ConversionReport, *, as_json: bool) -> Iterator[str]:
    """The closing table, or the report as one JSON document."""
    if as_json:
        yield json.dumps(report.to_dict(), indent=2)
        return
    for name, value in conversion_rows(report):
        yield f"{name:<17} {value}"


def conversion_rows(report: ConversionReport) -> Iterator[tuple[str, str]]:
    """Names and values of the closing table."""
    kept = "; ".join(f"{count} {reason}" for reason, count in Counter(layer.reason for layer in report.kept).items())
    rows = {
        "layers quantized": f"{len(report.layers)}",
        "layers kept": f"{len(report.kept)}" + (f" ({kept})" if kept else ""),
        "weights": f"{size_text(report.bytes_before)} → {size_text(report.bytes_after)} "
        f"({report.bytes_after / report.bytes_before:.0%})",
        "layer error": _errors(report),
        "rounding": ROUNDINGS[report.rounding],
        "time to calibrate": "" if report.calibration_seconds is None else f"{report.calibration_seconds:.1f} s",
        "time to convert": _time(report),
        "peak memory": "" if report.peak_memory is None else f"{report.peak_memory / 2**20:.0f} MiB anonymous",
        "output": str(report.output),
    }
    for name, value in rows.items():
        if value and (report.layers or not name.startswith("layer")):
            yield name, value


def _time(report: ConversionReport) -> str:
    if report.peak_memory is None:
        return "none: it was finished before"
    return f"{report.seconds:.1f} s, {size_text(report.bytes_before / max(report.seconds, 1e-9))}/s"


def _errors(report: ConversionReport) -> str:
    if not report.layers:
        return "none"
    worst = report.worst
    return f"median {report.median_error:.4f}, worst {worst.relative_error:.4f} ({worst.name})"


def plan_report(plan: Plan, *, as_json: bool) -> Iterator[str]:
    """The plan as `--dry-run` prints it: for every layer its dtypes, bytes and reason to stay; then the totals."""
    rows = [row for component in plan.components for row in _plan_rows(component)]
    if as_json:
        document = {
            "layers": rows,
            "notes": plan.notes,
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
        }
        yield json.dumps(document, indent=2)
        return
    width = max((len(row["layer"]) for row in rows), default=0)
    for row in rows:
        change = f"{row['from']:>4} → {row['to']:<16} {size_text(row['bytes']):>9}"
        yield f"{row['layer']:<{width}}  {change}  {row['why']}".rstrip()
    for note in plan.notes:
        yield f"Note: {note}"
    memory = "needs the memory of torch itself and a few tiles of 2 MiB, whatever the size of the model"
    yield f"weights {size_text(plan.bytes_before)} → {size_text(plan.bytes_after)}; {memory}; nothing was written"


def _plan_rows(component: ComponentPlan) -> Iterator[dict[str, Any]]:
    """One row for every linear that is, or could be, quantized."""
    prefix = f"{component.name}." if component.name else ""
    for step in component.steps:
        if isinstance(step, QuantizeStep):
            label = step.format.label if component.is_mixed else component.method
            for stem, weight in zip(step.group.members, step.weights, strict=True):
                size = sum(spec.nbytes for spec in step.outputs() if spec.name.rpartition(".")[0] == stem)
                source = DTYPE_NAMES[weight.dtype]
                yield {"layer": prefix + stem, "from": source, "to": label, "bytes": size, "why": ""}
    written = {spec.name: spec for specs in component.shards.files.values() for spec in specs}
    for stem, label in component.transcoded.items():
        specs = [spec for name, spec in written.items() if name.startswith(f"{stem}.")]
        size = sum(spec.nbytes for spec in specs)
        stored = written.get(f"{stem}{WEIGHT}") or written[stem]
        becomes = label if component.method == "keep" else DTYPE_NAMES[stored.dtype]
        yield {"layer": prefix + stem, "from": label, "to": becomes, "bytes": size, "why": ""}
    for layer in component.kept:
        spec = component.checkpoint[f"{layer.name}.weight"]
        dtype = DTYPE_NAMES[spec.dtype]
        yield {"layer": prefix + layer.name, "from": dtype, "to": dtype, "bytes": spec.nbytes, "why": layer.reason}


def size_text(count: float) -> str:
    """A number of bytes, in the unit that leaves one to three digits before the point."""
    unit = next((unit for unit, size in UNITS.items() if count >= size), "B")
    return f"{count:.0f} B" if unit == "B" else f"{count / UNITS[unit]:.1f} {unit}"
