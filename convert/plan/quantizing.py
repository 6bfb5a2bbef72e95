"""Plans a component whose layers are quantized, whichever container and dialect they are written in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omni_convert.convert.calibration.activation_scheme import (
    ActivationScheme,
    choose_activation_scheme,
    merged_scheme,
)
from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.rounding import CompensatedFormat, compensated
from omni_convert.convert.plan.component_plan import ComponentPlan, replace_config
from omni_convert.convert.plan.gguf_target import GgufTarget
from omni_convert.convert.plan.selection import Selection
from omni_convert.convert.plan.steps import KeptLayer, QuantizeStep, matrix_shape, ordered_steps, outputs
from omni_convert.convert.plan.target import RuntimeTarget, StorageTarget, Target
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component import SourceComponent
from omni_convert.formats.config import MIXED
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import WrittenSpelling
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.table import FORMATS
from omni_convert.formats.views.base import with_biases

__all__ = ["plan_quantized", "target_of"]


def target_of(component: SourceComponent, method: str, recipe: Recipe) -> Target:
    """The target of a component that is quantized with a method."""
    kind = FORMATS[method]
    target = GgufTarget if kind.is_container else StorageTarget if kind.is_storage else RuntimeTarget
    return target(component, method, recipe)


def plan_quantized(
    target: Target, selection: Selection, moments: Moments | None, encoder: ComponentPlan | None
) -> ComponentPlan:
    """Decides what every tensor of a component becomes.

    Args:
        selection: the layers to quantize and to keep
        moments: second moments of the layers' inputs, if rounding uses them
        encoder: the plan of the text encoder, if there is one already

    Raises:
        RecipeError: the recipe cannot be carried out on this model.
        CalibrationError: static activations without statistics, or GPTQ without the moments of a layer.
    """
    component = target.component
    formats = {group: target.format_of(group) for group in selection.chosen}
    methods = sorted({fmt.method for fmt in formats.values()} & FORMATS.keys())
    method = methods[0] if len(methods) == 1 else MIXED
    widths = {component.weights[f"{group.members[0]}{WEIGHT}"].shape[1] for group in formats}
    steps = [_quantize_step(target, group, fmt, moments) for group, fmt in formats.items()]
    scheme = _scheme_of(methods, target.recipe, steps)
    format_of = {stem: fmt for group, fmt in formats.items() for stem in target.written_group(group).members}
    kept = [(target.written_group(group), reason) for group, reason in selection.kept]
    kept_weights = {f"{stem}{WEIGHT}" for group, _ in kept for stem in group.members}

    def dtype_of_copy(spec: TensorSpec) -> torch.dtype:
        return target.dtype_of_copy(spec, is_layer=spec.name in kept_weights)

    codecs = {
        stem: spelling.bias
        for step in steps
        for stem, spelling in zip(step.group.members, step.spellings, strict=True)
        if stem not in step.biases
    }
    weights = with_biases(target.weights, codecs)
    ordered = tuple(ordered_steps(weights, steps, dtype_of_copy))
    listed = {name: fmt for group, fmt in formats.items() for name in target.written_group(group).names}
    named = format_of | (listed if target.dialect.lists_runtime_names else {})
    block = target.block(named, [group for group, _ in kept], encoder.quantized_stems if encoder else ())
    return ComponentPlan(
        component.name,
        method,
        target.dialect.name,
        weights,
        ordered,
        KeptLayer.of(kept),
        replace_config(component.written_config, block, target.stage),
        target.files(ordered, format_of),
        sidecars=target.sidecars(block, format_of, [spec.name for spec in outputs(ordered)]),
        notes=(
            *_requantizing_notes(component, method),
            *filter(None, [scheme.note]),
            *selection.scope.notes,
            *(note for each in methods for note in FORMATS[each].notes(widths)),
            *target.notes,
        ),
        scheme=scheme,
        is_mixed=bool(target.chosen),
    )


def _scheme_of(methods: Sequence[str], recipe: Recipe, steps: Sequence[QuantizeStep]) -> ActivationScheme:
    """How the inputs of steps with these methods are quantized, and what statistics are for."""
    formats = [step.format for step in steps if isinstance(step.format, CompensatedFormat)]
    rounded = {fmt.method for fmt in formats if fmt.moments is None}  # by statistics
    return merged_scheme([choose_activation_scheme(each, recipe, is_rounding=each in rounded) for each in methods])


def _requantizing_notes(component: SourceComponent, method: str) -> list[str]:
    """Warns that errors add up where the source is quantized already."""
    if not component.opened.layers:
        return []
    return [
        f"{component.name or component.opened.checkpoint.path.name}: {component.counted_layers} dequantized in float32 "
        f"and quantized again to {method}: both errors add up, and those shown are of the second only; the originals "
        "give a better result"
    ]


def _quantize_step(target: Target, group: LayerGroup, fmt: QuantizingFormat, moments: Moments | None) -> QuantizeStep:
    written = target.written_group(group)
    weights = tuple(target.weights[f"{stem}{WEIGHT}"] for stem in written.members)
    spellings = tuple(_spelling(target, fmt, weight) for weight in weights)
    biases: dict[str, TensorSpec] = {}
    if spellings[0].lacks_shift and getattr(fmt, "shift", False):
        found = {stem: target.weights.get(f"{stem}.bias") for stem in written.members}
        biases = {stem: bias for stem, bias in found.items() if bias is not None}
    columns = target.names.columns_of(written.members[0]) if target.names is not None else None
    rounded = fmt
    if target.allows_gptq:
        rounded = compensated(fmt, moments, group, target.component.name, target.recipe, columns)
    return QuantizeStep(
        written,
        tuple(group.members),
        rounded,
        None,  # comes with the statistics: `ComponentPlan.with_statistics`
        weights,
        spellings,
        biases,
        columns,
    )


def _spelling(target: Target, fmt: QuantizingFormat, weight: TensorSpec) -> WrittenSpelling:
    spelling = target.dialect.spelling(fmt, matrix_shape(weight))
    assert isinstance(spelling, WrittenSpelling), "`choose_layers` keeps what cannot be written"
    return spelling
