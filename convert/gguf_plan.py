"""Plans a component that becomes one GGUF file."""

from __future__ import annotations

from dataclasses import replace

from omni_convert.convert.component_plan import ComponentPlan, replace_config
from omni_convert.convert.component_weights import model_class
from omni_convert.convert.gguf_layers import choose_gguf, original_names
from omni_convert.convert.quantizing import requantizing_notes
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.selection import format_for
from omni_convert.convert.source_component import SourceComponent
from omni_convert.convert.steps import KeptLayer, QuantizeStep, ordered_steps, outputs
from omni_convert.formats.dialect import WrittenSpelling
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.gguf import Gguf
from omni_convert.formats.gguf_runtimes import architecture_of
from omni_convert.formats.sharding import Shards

__all__ = ["plan_gguf"]


def plan_gguf(component: SourceComponent, recipe: Recipe) -> ComponentPlan:
    """Decides what every tensor becomes: linears in blocks the type asked for, the rest float32, which all read.

    Raises:
        CheckpointError: the model is quantized in a way that nobody here reads.
        RecipeError: transformers loads the component; or nothing is left to quantize.
    """
    from omni_convert.formats.gguf_writer import GgufFile

    component.refuse_unread()
    if component.is_transformers:
        raise RecipeError(
            f"--component {component.name}={Gguf.method}: found a model of transformers, expected one of diffusers"
        )
    weights, kind_of_model = component.weights, model_class(component.config)
    architecture = architecture_of(kind_of_model)
    groups, kept = choose_gguf(weights, component.config_path, architecture, recipe)
    steps: dict[str, QuantizeStep] = {}
    for group in groups:
        fmt = format_for(Gguf.method, recipe, group, weights, calibrated=False)
        (stem,) = group.members
        steps[stem] = QuantizeStep(group, fmt, None, (weights[f"{stem}.weight"],), (WrittenSpelling(),))
    ordered = tuple(ordered_steps(weights, steps, replace(recipe, dtype="float32")))
    kind = next(iter(steps.values())).format
    assert isinstance(kind, Gguf)
    content = GgufFile(
        architecture,
        kind.type,
        {weight.name: weight.shape for step in steps.values() for weight in step.weights},
        original_names(kind_of_model, weights.keys()),
    )
    spelled = "its original" if content.names else "diffusers'"
    note = (
        f"{component.label}: the GGUF file has {spelled} names; load it with from_single_file(FILE, "
        "config=FOLDER OF ITS config.json, quantization_config=GGUFQuantizationConfig(...))"
    )
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
