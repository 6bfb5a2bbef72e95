"""Plans a component that becomes one GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from omni_convert.convert.plan.component_plan import ComponentPlan, replace_config
from omni_convert.convert.plan.gguf_layers import SMALL_ELEMENTS, choose_gguf
from omni_convert.convert.plan.gguf_names import choose_names
from omni_convert.convert.plan.quantizing import requantizing_notes
from omni_convert.convert.plan.selection import format_for
from omni_convert.convert.plan.steps import KeptLayer, QuantizeStep, ordered_steps, outputs
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component import SourceComponent
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.shards import Shards
from omni_convert.formats.dialects.base import WrittenSpelling
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.gguf import Gguf

__all__ = ["plan_gguf"]

HOW_TO_LOAD = (
    "load it with from_single_file(FILE, config=FOLDER OF ITS config.json, "
    "quantization_config=GGUFQuantizationConfig(...))"
)


def plan_gguf(component: SourceComponent, recipe: Recipe) -> ComponentPlan:
    """Decides what every tensor becomes: linears in blocks the type asked for, the rest float32, which all read.

    Linears in blocks that are kept for ComfyUI-GGUF stay BF16 or FP16, as its own quantizer leaves them: they may be a
    good part of the model. Other weights may not: diffusers reads BF16 of linear layers alone.

    Raises:
        CheckpointError: the model is quantized in a way that nobody here reads.
        RecipeError: transformers loads the component; nothing is left to quantize; or it cannot have the names asked
            for.
    """
    from omni_convert.formats.containers.gguf_writer import GgufFile

    component.refuse_unread()
    if component.is_transformers:
        raise RecipeError(
            f"--component {component.name}={Gguf.method}: found a model of transformers, expected one of diffusers"
        )
    names = choose_names(component.weights, component.config, recipe)
    weights = names.checkpoint
    groups, kept = choose_gguf(component.weights, names, component.config_path, component.family.gguf, recipe)
    steps: dict[str, QuantizeStep] = {}
    for group in groups:
        fmt = format_for(Gguf.method, recipe, group, weights, calibrated=False)
        (stem,) = group.members
        steps[stem] = QuantizeStep(group, fmt, None, (weights[f"{stem}.weight"],), (WrittenSpelling(),))
    halves = [name for group, _ in kept for name in _halves(weights, group)]
    ordered = tuple(ordered_steps(weights, steps, replace(recipe, dtype="float32"), halves))
    kind = next(iter(steps.values())).format
    assert isinstance(kind, Gguf)
    shapes = {weight.name: weight.shape for step in steps.values() for weight in step.weights}
    content = GgufFile(component.family.gguf.architecture, kind.type, shapes)
    note = f"{component.label}: the GGUF file has {names.note}"
    if names.is_for_diffusers:
        note += f"; {HOW_TO_LOAD}"
    return ComponentPlan(
        component.name,
        Gguf.method,
        weights,
        ordered,
        KeptLayer.of(kept),
        replace_config(component.config, None),
        Shards({f"{component.source.short_name}-{kind.type}.gguf": outputs(ordered)}, None, "", {}, content),
        notes=(*requantizing_notes(component, Gguf.method), note),
    )


def _halves(weights: Checkpoint, group: LayerGroup) -> Iterator[str]:
    """Weights of a layer that GGUF need not widen."""
    for stem in group.members:
        spec = weights[f"{stem}.weight"]
        if spec.dtype in (torch.bfloat16, torch.float16) and spec.elements > SMALL_ELEMENTS:
            yield spec.name
