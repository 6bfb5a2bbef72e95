"""Plans a component whose layers are quantized to safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_convert.convert.calibration.activation_scheme import choose_activation_scheme
from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.rounding import compensated
from omni_convert.convert.plan.component_plan import ComponentPlan, plan_files, replace_config
from omni_convert.convert.plan.selection import (
    choose_layers,
    format_for,
    hardware_notes,
    other_linears,
    recommendation_notes,
)
from omni_convert.convert.plan.shared_encoder import unquantized_encoder_layers
from omni_convert.convert.plan.steps import KeptLayer, QuantizeStep, matrix_shape, ordered_steps, outputs
from omni_convert.convert.plan.storage import choose_stored
from omni_convert.convert.recipe import STORAGE_METHODS, Recipe
from omni_convert.convert.source.component import SourceComponent
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects import omni_convert, vllm_omni
from omni_convert.formats.dialects.base import Dialect, WrittenSpelling
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.format import Format, QuantizingFormat

__all__ = ["plan_quantized", "requantizing_notes"]


def plan_quantized(
    component: SourceComponent, method: str, recipe: Recipe, moments: Moments | None, encoder: ComponentPlan | None
) -> ComponentPlan:
    """Decides what every tensor of a component becomes.

    Args:
        moments: of the inputs of its layers, if rounding uses them
        encoder: what becomes of the text encoder, if that was planned already

    Raises:
        CheckpointError: the model is quantized in a way that nobody here reads, or a member of a group is missing.
        RecipeError: the recipe cannot be carried out on this model.
        CalibrationError: static activations without statistics, or GPTQ without the moments of a layer.
    """
    component.refuse_unread()
    scheme = choose_activation_scheme(method, recipe)
    groups, kept = _choose(component, method, recipe)
    formats = {
        group: format_for(method, recipe, group, component.weights, calibrated=scheme.is_calibrated) for group in groups
    }
    steps = {
        group.members[0]: _quantize_step(component, method, group, fmt, recipe, moments)
        for group, fmt in formats.items()
    }
    format_of = {stem: fmt for group, fmt in formats.items() for stem in group.members}
    ordered = tuple(ordered_steps(component.weights, steps, recipe))
    ignored = vllm_omni.ignored_names(group for group, _ in kept)
    if component.is_denoiser:
        stems = encoder.quantized_stems if encoder is not None else ()
        ignored += unquantized_encoder_layers(component.source, component.family, stems)
    quantization = QuantizationConfig(
        method,
        scheme.name,
        recipe.weight_block_size if method == "fp8" else None,
        tuple(sorted(set(ignored))),
        require_smooth_scale=scheme.is_calibrated and method == "mxfp4",
    )
    dialect = DIALECTS[recipe.dialect]
    notes = [*requantizing_notes(component, method), *([scheme.note] if scheme.note else [])]
    return ComponentPlan(
        component.name,
        method,
        component.weights,
        ordered,
        KeptLayer.of(kept),
        replace_config(component.config, _block(component, dialect, quantization, format_of)),
        plan_files(ordered, recipe, dialect.metadata(format_of), is_transformers=component.is_transformers),
        sidecars=dialect.sidecars(format_of, [spec.name for spec in outputs(ordered)]),
        notes=(*notes, *_family_notes(component, method, recipe, groups)),
        scheme=scheme,
    )


def requantizing_notes(component: SourceComponent, method: str) -> list[str]:
    """What it means to quantize what was quantized before."""
    if not component.opened.layers:
        return []
    return [
        f"{component.name or component.opened.checkpoint.path.name}: {component.counted_layers} dequantized in float32 "
        f"and quantized again to {method}: both errors add up, and those shown are of the second only; the originals "
        "give a better result"
    ]


def _choose(
    component: SourceComponent, method: str, recipe: Recipe
) -> tuple[list[LayerGroup], list[tuple[LayerGroup, str]]]:
    """Groups to quantize, and groups that stay, each with the reason."""
    where, config = component.config_path, component.config
    if method in STORAGE_METHODS:
        return choose_stored(component.weights, where, config, recipe, is_transformers=component.is_transformers)
    return choose_layers(component.family, component.weights, where, config, method, recipe)


def _quantize_step(
    component: SourceComponent,
    method: str,
    group: LayerGroup,
    fmt: QuantizingFormat,
    recipe: Recipe,
    moments: Moments | None,
) -> QuantizeStep:
    if method not in STORAGE_METHODS:
        fmt = compensated(fmt, moments, group, component.name, recipe)
    return QuantizeStep(
        group,
        fmt,
        None,  # comes with the statistics: `ComponentPlan.with_statistics`
        tuple(component.weights[f"{stem}.weight"] for stem in group.members),
        _spellings(DIALECTS[recipe.dialect], fmt, group, component.weights),
    )


def _spellings(dialect: Dialect, fmt: Format, group: LayerGroup, checkpoint: Checkpoint) -> tuple[WrittenSpelling, ...]:
    """How each member of a group is written: `choose_layers` has left out what cannot be."""
    spellings = []
    for stem in group.members:
        spelling = dialect.spelling(fmt, matrix_shape(checkpoint[f"{stem}.weight"]))
        assert isinstance(spelling, WrittenSpelling), spelling
        spellings.append(spelling)
    return tuple(spellings)


def _family_notes(component: SourceComponent, method: str, recipe: Recipe, groups: list[LayerGroup]) -> list[str]:
    # Of an encoder no family is known, nor needed.
    known = [] if component.is_transformers else component.family.notes(method, recipe.runtime, component.weights)
    return [
        *known,
        *recommendation_notes(component.family, method, recipe),
        *hardware_notes(groups, component.weights, method),
    ]


def _block(
    component: SourceComponent, dialect: Dialect, quantization: QuantizationConfig, formats: Mapping[str, Format]
) -> dict[str, Any] | None:
    """`quantization_config` of config.json, in the words of who reads it."""
    if dialect is not vllm_omni.VLLM_OMNI:
        return dialect.block(formats, {*quantization.ignored_layers, *other_linears(component.weights, formats)})
    return omni_convert.to_block(quantization) if component.is_transformers else vllm_omni.to_block(quantization)
