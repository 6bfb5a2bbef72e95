"""The reports of the commands: what each has to show, as sections of a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omni_convert.convert.inspection.verification import VerifiedComponent
from omni_convert.convert.page.charts import Measure, heat_map, line_chart
from omni_convert.convert.page.choice_pictures import MEGA, chosen_point, noise_curve
from omni_convert.convert.page.document import Section, facts, page, sortable_table
from omni_convert.convert.page.html import Content, Markup, element, joined
from omni_convert.convert.page.pictures import picture_pair
from omni_convert.convert.plan.plan import Plan
from omni_convert.convert.precision.advice import budgets, shares
from omni_convert.convert.precision.analysis import Analysis
from omni_convert.convert.precision.mixture import Mixture
from omni_convert.convert.report import ConversionReport, conversion_rows
from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["analysis_page", "comparison_page", "conversion_page", "verification_page"]

#: Images or frames that are shown, evenly spread; the metrics are those of all.
PICTURES_SHOWN = 8
#: Name of the measure that statistics give.
LARGEST_INPUT = "largest input over the steps"
#: Metrics in the report of `compare`: key → head of the column, and decimals.
METRICS = {
    "psnr_db": ("PSNR dB", 2),
    "mae": ("MAE", 3),
    "cosine_similarity": ("cosine", 6),
    "relative_l2": ("relative L2", 4),
}


def conversion_page(plan: Plan, report: ConversionReport, mixture: Mixture | None, command: str) -> str:
    """The report of a conversion.

    Args:
        command: how to repeat it
    """
    sections = [
        Section("Result", facts(dict(conversion_rows(report)))),
        Section("Layers", _converted_layers(plan, report)),
    ]
    if mixture is not None:
        sections.append(Section("Size and noise", noise_curve(mixture.analysis, [chosen_point(mixture)])))
    if mixture is not None and mixture.trial:
        sections.append(Section("Choices that were tried", _trial_table(mixture)))
    if report.kept:
        rows = [[layer.name, layer.reason] for layer in report.kept]
        sections.append(Section("Layers that stay", sortable_table(["layer", "why"], rows)))
    sections += [_notes(report.notes), _recipe(command, plan.recipe.of_the_bytes())]
    return page(f"Conversion of {plan.source.short_name}", [each for each in sections if each.content])


def _trial_table(mixture: Mixture) -> Markup:
    rows: list[list[Content | tuple[float, str]]] = [
        [name, (error, f"{error:.3f}")] for name, error in mixture.trial.items()
    ]
    return sortable_table(["choice", "RMSE in grey levels"], rows)


def _converted_layers(plan: Plan, report: ConversionReport) -> Markup:
    labels = {
        f"{component.name}.{stem}" if component.name else stem: label
        for component in plan.components
        for stem, label in component.labels.items()
    }
    planned = {
        f"{component.name}.{stem}" if component.name else stem: (weight.elements, step.inputs)
        for component in plan.components
        for step in component.quantize_steps
        for stem, weight in zip(step.group.members, step.weights, strict=True)
    }
    sizes = {layer.name: layer.bytes_after for layer in report.layers}
    bits = {name: 8 * sizes[name] / weights for name, (weights, _) in planned.items() if name in sizes}
    largest = {name: inputs.amax() for name, (_, inputs) in planned.items() if inputs is not None}
    measures = [
        Measure("weight error", {layer.name: layer.relative_error for layer in report.layers}, ".4f"),
        Measure("bits per weight", bits, ".2f"),
        *([Measure(LARGEST_INPUT, largest)] if largest else []),
    ]
    rows: list[list[Content | tuple[float, str]]] = [
        [
            layer.name,
            labels.get(layer.name, layer.method),
            (layer.bytes_after, f"{layer.bytes_after / MEGA:.3f}"),
            (layer.relative_error, f"{layer.relative_error:.4f}"),
        ]
        for layer in report.layers
    ]
    return joined((heat_map(measures), sortable_table(["layer", "format", "MB", "weight error"], rows)))


def analysis_page(analysis: Analysis, statistics: Statistics, others: int, command: str) -> str:
    """The report of an analysis.

    Args:
        others: bytes of the files of weights beside those of the units
        command: how to repeat it
    """
    found = shares(analysis)
    steps = {
        name: float(statistics.layers[name].step_amax.max())
        for row in found
        for layer in row.unit.layers
        if (name := f"{row.unit.component}.{layer}") in statistics.layers
    }
    parts = {
        f"{row.unit.component}.{layer}": 100 * row.part / len(row.unit.layers)
        for row in found
        for layer in row.unit.layers
    }
    measures = [
        Measure("% of the error", parts, ".2f"),
        Measure(LARGEST_INPUT, steps),
    ]
    rows: list[list[Content | tuple[float, str]]] = [
        [
            f"{row.unit.component}.{row.unit.names[0]}",
            option.name,
            (option.error, f"{option.error:.3g}"),
            (option.size, f"{option.size / MEGA:.3f}"),
        ]
        for row in found
        for option in row.unit.options
    ]
    table = sortable_table(["layers", "format", "predicted error", "MB"], rows)
    marked = [(each.size / MEGA, each.noise, each.name) for each in budgets(analysis)]
    return page(
        "Analysis of formats",
        [
            Section("Size and noise", joined((noise_curve(analysis, marked), _budget_table(analysis, others)))),
            Section("Share of the error in the smallest format", heat_map(measures)),
            Section("Every format in every layer", table),
            _recipe(command, dict(analysis.recipe)),
        ],
    )


def _budget_table(analysis: Analysis, others: int) -> Markup:
    rows: list[list[Content | tuple[float, str]]] = [
        [each.name, (each.size + others, f"{(each.size + others) / MEGA:.2f}"), (each.noise, f"{each.noise:.2f}")]
        for each in budgets(analysis)
    ]
    return sortable_table(["budget", "MB of files", "predicted noise ratio"], rows)


def comparison_page(report: Mapping[str, Any], images: Sequence[tuple[Any, Any, str]], command: str) -> str:
    """The report of a comparison.

    Args:
        report: the document of `compare`
        images: reference, candidate and prompt
        command: how to repeat it
    """
    metrics = report["output_metrics"]
    rows: list[list[Content | tuple[float, str]]] = [
        [index, prompt, *(_metric(each[name], decimals) for name, (_, decimals) in METRICS.items())]
        for index, (each, (_, _, prompt)) in enumerate(zip(metrics["per_image_metrics"], images, strict=True))
    ]
    shown = images[:: -(-len(images) // PICTURES_SHOWN)]
    pairs = [picture_pair(reference, candidate, prompt) for reference, candidate, prompt in shown]
    sections = [
        Section("Pictures", joined(pairs)),
        Section("Metrics", sortable_table(["image", "prompt", *(head for head, _ in METRICS.values())], rows)),
    ]
    steps = report.get("trajectory_metrics", {}).get("mean_relative_l2_per_step") or []
    if any(value is not None for value in steps):
        known = [(step, value) for step, value in enumerate(steps, 1) if value is not None]
        points = [(step, value, f"step {step}: {value:.4g}") for step, value in known]
        chart = line_chart(points, ("denoising step", "relative L2 of the latents"))
        sections.append(Section("Distance of the latents", joined((chart, _step_table(report)))))
    sections += [
        Section("Runs", _run_table(report)),
        _recipe(command, {name: report[name] for name in ("model", "seed", "sampling_kwargs", "variant_configs")}),
    ]
    return page(f"Comparison with {report['model']}", sections)


def _step_table(report: Mapping[str, Any]) -> Markup:
    """The distances of each prompt after each step."""
    each = report["trajectory_metrics"]["per_prompt_relative_l2_per_step"]
    prompts = report["prompt"] if isinstance(report["prompt"], list) else [report["prompt"]]
    steps = range(max(map(len, each)))
    rows: list[list[Content | tuple[float, str]]] = [
        [prompt, *(_distance(distances[step : step + 1]) for step in steps)]
        for prompt, distances in zip(prompts, each, strict=True)
    ]
    return sortable_table(["prompt", *(f"step {step + 1}" for step in steps)], rows)


def _distance(found: Sequence[float | None]) -> tuple[float, str]:
    """A distance as a cell; without one the step was not taken, or its latents are no numbers."""
    value = next(iter(found), None)
    return (math.inf, "none") if value is None else (value, f"{value:.4f}")


def _metric(value: float | None, decimals: int) -> tuple[float, str]:
    """None stands for infinity: the PSNR of equal images, or the relative distance from a black one."""
    return (float("inf"), "infinite") if value is None else (value, f"{value:.{decimals}f}")


def _run_table(report: Mapping[str, Any]) -> Markup:
    rows: list[list[Content | tuple[float, str]]] = []
    for side in ("reference", "candidate"):
        seconds = report[f"{side}_generation"]["avg_generation_time_s"]
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in report[f"{side}_kernels"].items()) or "BF16 alone"
        rows.append([side, (seconds, f"{seconds:.2f}"), kernels])
    return sortable_table(["side", "seconds", "kernels"], rows)


def verification_page(name: str, components: Sequence[VerifiedComponent], command: str) -> str:
    """The report of a verification."""
    sections = [Section(component.name or name, joined(_verified(component))) for component in components]
    return page(f"Verification of {name}", [*sections, _recipe(command, {})])


def _verified(component: VerifiedComponent) -> Iterator[Markup]:
    contents = f"{component.contents}. " if component.dialect else ""
    yield element("p", contents, "Nothing wrong." if not component.findings else None)
    if component.findings:
        rows = [
            [each.severity, each.check, each.layer, each.what, each.hurts, each.remedy] for each in component.findings
        ]
        yield sortable_table(["severity", "check", "layer", "found", "hurts", "remedy"], rows)
    errors = {stem: error for stem, error in component.errors.items() if math.isfinite(error)}
    if errors:
        yield heat_map([Measure("relative error", errors, ".4f")])
    if component.unchecked:
        yield element("p", f"Not checked without --reference MODEL: {', '.join(component.unchecked)}.", class_="note")


def _notes(notes: Sequence[str]) -> Section:
    return Section("Notes", element("ul", *(element("li", note) for note in notes)) if notes else Markup(""))


def _recipe(command: str, options: Mapping[str, Any]) -> Section:
    shown = facts({name: _option(value) for name, value in options.items()})
    return Section("To repeat it", joined((element("pre", command), shown)))


def _option(value: Any) -> str:
    """An option of a recipe, as it is typed."""
    if isinstance(value, Mapping):
        value = [f"{name}={each}" for name, each in value.items()]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
