"""The model card, OUT/README.md: metadata in the Hub's format, what was done, and how to run the result."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from omni_convert.convert.execution.component_result import LayerResult
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.plan import Plan
from omni_convert.formats.dialects.table import DIALECTS

__all__ = ["model_card"]

BODY = """
# {title}

{source}, {what} with [omni-convert](https://pypi.org/project/omni-convert/).

| component | method | activations | layers | kept | size before | size after | median layer error | worst layer error |
|---|---|---|---|---|---|---|---|---|
{rows}

A layer's error is the Frobenius norm of the difference between the quantized and the original weight over that of the
original. Every other tensor and file is the original, byte for byte; `omni_convert.json` lists each layer, and the
SHA-256 of each file.
{rounding}{pictures}
## Run it

{run}
"""

ROUNDED = """
Where GPTQ rounded a weight, the outputs of its layer have a smaller error, and the weight itself has a larger one.
"""

PICTURES = """
## How the formats were chosen

The first picture shows the size of the layers and the noise ratio that was predicted for it, with this model marked.
The second one shows the layers by block and role: a stronger colour is a larger share of the error with all layers in
their smallest formats, and the text is the format that the layer got.

{pictures}
"""


def model_card(plan: Plan, results: dict[str, Sequence[LayerResult]], pictures: Sequence[str] = ()) -> str:
    """The text of README.md.

    Args:
        plan: the plan that was carried out
        results: component name → its quantized layers
        pictures: files beside the card that show how the formats were chosen
    """
    declared = _inherited(plan.source.path)
    data = ModelCardData(
        base_model=plan.source.repo_id,
        base_model_relation="quantized" if plan.source.repo_id else None,
        library_name="transformers" if _is_of_transformers(plan) else "diffusers",
        license=declared.get("license"),
        license_name=declared.get("license_name"),
        license_link=declared.get("license_link"),
        pipeline_tag=declared.get("pipeline_tag"),
        tags=sorted({"omni-convert", *_tags(plan)}),
    )
    source = (
        f"[{plan.source.name}](https://huggingface.co/{plan.source.name})" if plan.source.repo_id else plan.source.name
    )
    title = (
        f"{plan.source.short_name}-{plan.recipe.outcome}"  # not the output's name: the same job gives the same bytes
    )
    run = _run(plan, title)
    source += "".join(f", with the LoRA **{lora['name']}** ({lora['scale']:g})" for lora in _loras(plan))
    body = BODY.format(
        title=title,
        source=source,
        what=_what(plan),
        rows="\n".join(_rows(plan, results)),
        rounding="" if plan.rounding == "nearest" else ROUNDED,
        pictures=PICTURES.format(pictures="\n\n".join(_shown(name) for name in pictures)) if pictures else "",
        run=run,
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _shown(picture: str) -> str:
    return f"![{Path(picture).stem.replace('_', ' ')}]({picture})"


def _is_of_transformers(plan: Plan) -> bool:
    return any("architectures" in each.config and "_class_name" not in each.config for each in plan.components)


def _loras(plan: Plan) -> list[dict[str, Any]]:
    return [lora for baked in plan.loras.values() for lora in baked]


def _tags(plan: Plan) -> set[str]:
    if plan.recipe.method == "dequantize":
        return set()
    if plan.recipe.method == "keep":
        return {"quantized", plan.recipe.dialect} if any(each.transcoded for each in plan.components) else set()
    return {"quantized", *(method for component in plan.components for method in component.methods)}


def _what(plan: Plan) -> str:
    """A phrase for what was done to the source."""
    recipe = plan.recipe
    if recipe.budget is not None:
        formats = " and ".join(_formats(component) for component in plan.components if component.is_mixed)
        return f"quantized to **{formats}**, mixed for `{recipe.budget}`"
    if not recipe.is_transcoding:
        return f"quantized to **{recipe.method}**"
    labels = sorted({label for component in plan.components for label in component.transcoded.values()})
    if not labels:
        return "converted"
    if recipe.method == "dequantize":
        return f"dequantized (it was {', '.join(labels)})"
    return f"which is quantized ({', '.join(labels)}), written for **{recipe.dialect}** without changing a value,"


def _formats(component: ComponentPlan) -> str:
    """The formats of a component's layers; of a mixture with the number of layers of each."""
    if not component.is_mixed:
        return component.method
    counts = Counter(component.labels.values())
    return ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))


def _run(plan: Plan, title: str) -> str:
    """Instructions for running the result."""
    if not any(component.quantized_stems or component.transcoded for component in plan.components):
        return "Run it like the original model."
    if plan.recipe.method == "dequantize":
        return "Run it like the model before it was quantized."
    usual = plan.recipe.dialect
    component = next((each for each in plan.components if each.dialect != usual), plan.components[0])
    is_ours = component.is_mixed and component.dialect == "modelopt"  # in which vLLM-Omni reads mixtures
    doubt = f"\n\nNot proven: {component.unproven}." if component.unproven else ""
    run = DIALECTS["vllm-omni" if is_ours else component.dialect].instructions.format(
        title=title,
        dialect=component.dialect,
        model_class=component.config.get("_class_name", "ModelMixin"),
        folder=f"{title}/{component.name}".rstrip("/"),
        file=next(iter(component.shards.files)),
    )
    return f"{run}{doubt}"


INHERITED = ("license", "license_name", "license_link", "pipeline_tag")


def _inherited(folder: Path) -> dict[str, str]:
    """Metadata of the source's card that also applies to the quantized model, such as the license."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    data = ModelCard(card.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data
    return {name: value for name in INHERITED if isinstance(value := getattr(data, name, None), str)}


def _rows(plan: Plan, results: dict[str, Sequence[LayerResult]]) -> list[str]:
    rows = []
    for component in plan.components:
        layers = results[component.name]
        errors = [layer.relative_error for layer in layers]
        worst = max(layers, key=lambda layer: layer.relative_error, default=None)
        declared = component.config.get("quantization_config", {}).get("activation_scheme", "dynamic")
        scheme = component.scheme.name if component.scheme is not None else declared
        shown = (
            f"{statistics.median(errors):.4f} | {worst.relative_error:.4f} ({worst.name})" if worst else "kept | kept"
        )
        rows.append(
            f"| {component.name or 'model'} | {_formats(component)} | {scheme} "
            f"| {len(layers) or len(component.transcoded)} | {len(component.kept)} "
            f"| {component.bytes_before / 1e6:.1f} MB | {component.bytes_after / 1e6:.1f} MB "
            f"| {shown} |"
        )
    return rows
