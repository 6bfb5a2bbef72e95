"""Plans a component in which nothing is quantized: it is re-encoded, dequantized, or only gets LoRA files."""

from __future__ import annotations

from typing import Any

from omni_convert.convert.plan.component_plan import ComponentPlan, plan_files, replace_config
from omni_convert.convert.plan.reencoding import Reencoding, reencode
from omni_convert.convert.plan.shared_encoder import unquantized_encoder_layers
from omni_convert.convert.plan.steps import CopyStep, dtype_of_copy, outputs
from omni_convert.convert.plan.target import other_linears
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.built_model import stems_in_model
from omni_convert.convert.source.component import SourceComponent
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.dialects.vllm_omni import VLLM_OMNI
from omni_convert.formats.errors import RecipeError

__all__ = ["plan_transcoded"]


def plan_transcoded(component: SourceComponent, recipe: Recipe, encoder: ComponentPlan | None) -> ComponentPlan:
    """Decides what every tensor of a component becomes.

    Args:
        encoder: the plan of the text encoder, if there is one already

    Raises:
        CheckpointError: the model is quantized in a way that nobody here reads, or a layer cannot be expressed.
        RecipeError: the runtime cannot run the model; or it is to be kept, and its container has no other dialect.
    """
    component.refuse_unread()
    if component.stage is not None and recipe.method == "keep":
        raise RecipeError(
            f"{component.config_path}: found -m keep for a repository with stages, expected -m METHOD, which quantizes "
            "it, or `omni-convert dequantize`"
        )
    dialect = component.opened.dialect
    if recipe.method == "keep" and dialect is not None and DIALECTS[dialect].declared_by == "container":
        raise RecipeError(
            f"{component.opened.checkpoint.path}: found {dialect.upper()} with -m keep, which no other dialect holds; "
            "copy the file to keep it, or use `omni-convert dequantize`, or -m METHOD, which quantizes again"
        )
    quantized = component.opened.layers
    view: Checkpoint = component.weights
    block: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    sidecars: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    is_reencoded = recipe.method == "keep" and bool(quantized)
    if is_reencoded:
        reencoding = _reencoding(component, recipe, encoder)
        view, block, metadata = component.marked(reencoding.view, recipe), reencoding.block, reencoding.metadata
        family = component.served_family
        if family is not None:
            metadata = metadata | DIALECTS[recipe.dialect].model_metadata(component.config, family)
        notes += reencoding.notes
    elif quantized:
        notes.append(f"{component.label}: {component.counted_layers} dequantized")
    steps = tuple(CopyStep(spec, dtype_of_copy(spec, view, recipe)) for spec in view.values())
    if is_reencoded:
        formats = {stem: layer.format for stem, layer in quantized.items()}
        sidecars = DIALECTS[recipe.dialect].sidecars(formats, [spec.name for spec in outputs(steps)])
    return ComponentPlan(
        component.name,
        recipe.method,
        recipe.dialect,
        view,
        steps,
        (),
        replace_config(component.written_config, block, component.stage),
        plan_files(steps, recipe, metadata, component),
        {stem: layer.format.label for stem, layer in quantized.items()},
        sidecars,
        tuple(notes),
    )


def _reencoding(component: SourceComponent, recipe: Recipe, encoder: ComponentPlan | None) -> Reencoding:
    family = component.family if component.has_config else None
    others: list[str] = []
    if family is not None and component.is_denoiser and VLLM_OMNI.name in DIALECTS[recipe.dialect].runtimes:
        stems = encoder.quantized_stems if encoder is not None else ()
        others = unquantized_encoder_layers(component.source, family, stems)
    if component.is_transformers and DIALECTS[recipe.dialect].looks_up_model_names:
        opened = component.opened
        kept = other_linears({name: opened.checkpoint[stored] for name, stored in opened.kept.items()})
        others += stems_in_model(opened.checkpoint, component.config_if_any, kept)
    return reencode(component.opened, family, recipe, others, is_transformers=component.is_transformers)
