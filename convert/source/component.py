"""A component that is converted: its files as stored, and its weights in plain numbers under diffusers' names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omni_convert.convert.recipe import LoraRequest, Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.location import Source
from omni_convert.convert.source.lora import Lora, bake, check_requests
from omni_convert.convert.source.single_file import (
    derive_config,
    missing_config,
    read_given_config,
    undecided_config,
)
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import Run
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError, RecipeError, counted, quoted
from omni_convert.formats.families.table import model_class
from omni_convert.formats.views.base import FLOAT8, dequantized_view, marked_view
from omni_convert.formats.views.opened import QuantizedCheckpoint
from omni_convert.formats.views.original_names import (
    layers_under_diffusers_names,
    layers_under_names_of_readers,
    may_have_original_names,
    prefixes_of,
    refuse_other_model,
    under_diffusers_names,
    without_prefix,
)
from omni_convert.formats.views.renamed import renamed_view

__all__ = ["SourceComponent", "cast_tensors", "open_components", "plain_weights"]


@dataclass(frozen=True)
class SourceComponent(ComponentFolder):
    """A component of the model that is converted.

    Attributes:
        opened: its tensors and quantized layers as they are stored, in any dialect
        weights: the input of every method: plain numbers under diffusers' names, with LoRA files baked in
        loras: the LoRA files that are baked in
        notes: notes for the user on how `weights` were derived
        is_config_certain: the config is that of the model, not only one with the same tensors
    """

    opened: QuantizedCheckpoint
    weights: Checkpoint
    loras: tuple[Lora, ...] = ()
    notes: tuple[str, ...] = ()
    is_config_certain: bool = True

    @property
    def written_config(self) -> dict[str, Any]:
        """The config for the result; {} if there is none that is certain."""
        return self.config_if_any if self.is_config_certain else {}

    @property
    def is_changed(self) -> bool:
        """Whether a conversion that quantizes nothing would change this component."""
        is_dequantized = self.opened.shown_dialect is not None or self.weights is not self.opened.checkpoint
        return self.is_assembled or is_dequantized

    @property
    def counted_layers(self) -> str:
        """The number of quantized layers and their formats: `24 layers (nvfp4 as modelopt spells it)`."""
        labels = dict.fromkeys(layer.format.label for layer in self.opened.layers.values())
        return f"{len(self.opened.layers)} layers ({', '.join(labels)} as {self.opened.dialect} spells it)"

    def marked(self, weights: Checkpoint, recipe: Recipe) -> Checkpoint:
        """The tensors with the markers by which ComfyUI tells the model's variant, or without, as the reader expects.

        Args:
            weights: tensors of the component

        Raises:
            CheckpointError: a marker contradicts the config.
        """
        family = self.served_family
        if family is None or recipe.method == "dequantize":
            return weights
        wanted, present = family.markers_of(self.config), family.every_marker & weights.keys()
        if _may_have_other_names(recipe):
            return marked_view(weights, (), wanted - present) if wanted - present else weights
        for key, marker in family.markers:
            if marker in present - wanted:
                raise CheckpointError(
                    f"{self.opened.checkpoint.path}: found the tensor '{marker}', by which ComfyUI sets {key}, and no "
                    f"{key} in {self.config_path}, expected both or none; correct the config, or remove the tensor"
                )
        return marked_view(weights, present, ()) if present else weights

    def refuse_unread(self) -> None:
        """Raises CheckpointError if it is quantized in a way that is not supported."""
        block = self.config_if_any.get("quantization_config")
        if block and not self.opened.layers:
            kind = block.get("quant_method") if isinstance(block, dict) else type(block).__name__
            raise CheckpointError(
                f"{self.config_path}: found a model quantized already ({quoted(str(kind))}) and no layer that can be "
                "read here, expected the original weights"
            )


def _may_have_other_names(recipe: Recipe) -> bool:
    """Whether readers of what is written know models by other names than diffusers', and need no config."""
    return recipe.method == "gguf" or DIALECTS[recipe.dialect].names_expected == "original"


def plain_weights(opened: QuantizedCheckpoint) -> Checkpoint:
    """The tensors of a component as plain numbers: its quantized layers dequantized, FP8 numbers in BF16."""
    return dequantized_view(opened) if opened.layers or cast_tensors(opened) else opened.checkpoint


def cast_tensors(opened: QuantizedCheckpoint) -> list[str]:
    """Names of the tensors that were cast to FP8, without a scale."""
    return [stored for stored in opened.kept.values() if opened.checkpoint[stored].dtype in FLOAT8]


def open_components(source: Source, names: Iterable[str], recipe: Recipe) -> dict[str, SourceComponent]:
    """Opens components: each as plain numbers under diffusers' names with the recipe's LoRA files baked in.

    Raises:
        CheckpointError: a file is damaged, or does not belong to the model that the config describes.
        RecipeError: a LoRA file fits no component, or would change layers that `-m keep` must not change.
    """
    is_here = source.hub_files is None  # rows of a file on the Hub would have to be downloaded before the plan is made
    opened = {name: ComponentFolder(source, name).open(values=is_here) for name in names}
    components = {name: SourceComponent(source, name, opened[name], plain_weights(opened[name])) for name in opened}
    components = {name: _with_config(component, recipe) for name, component in components.items()}
    components = {name: _named_for_recipe(component, recipe) for name, component in components.items()}
    requests, parts = check_requests(recipe.lora, opened)
    components |= {name: _baked(components[name], requests[name], parts, recipe) for name in requests}
    return {name: replace(each, weights=each.marked(each.weights, recipe)) for name, each in components.items()}


def _with_config(component: SourceComponent, recipe: Recipe) -> SourceComponent:
    """A single file with the config that the user names, or that its tensors tell.

    Raises:
        RecipeError: the model has configs of its own.
        CheckpointError: the tensors do not tell it, and the result needs it.
    """
    if recipe.config is not None:
        if component.name:
            raise RecipeError(f"--config: found with {component.source.name}, whose components have their own configs")
        return replace(component, given_config=read_given_config(recipe.config))
    is_kept = recipe.method == "keep" and bool(component.opened.layers)
    if component.has_config or component.path.is_dir() or (recipe.is_transcoding and not is_kept):
        return component
    derived = derive_config(component.weights)
    needs_none = _may_have_other_names(recipe)
    if is_kept and (derived is None or (derived.undecided and not needs_none)):
        return component
    if derived is None and not needs_none:
        raise missing_config(component.weights, component.config_path)
    if derived is None:
        return _of_unknown_model(component)
    if derived.undecided and not needs_none:
        raise undecided_config(derived, component.config_path)
    found = f"{component.label}: no config.json beside it; by its tensors it is {model_class(derived.config)}"
    return replace(
        component,
        given_config=derived.config,
        is_config_certain=not derived.undecided,
        notes=(found if not derived.undecided else f"{found}, of which they tell the names and not every setting",),
    )


def _of_unknown_model(component: SourceComponent) -> SourceComponent:
    """A file whose names stay; of several models in it, the denoising one is taken, without its prefix."""
    weights = component.weights
    prefix = next((prefix for prefix in prefixes_of(weights) if prefix.endswith("diffusion_model.")), "")
    own = without_prefix(weights, prefix)
    runs = {name: [Run(prefix + name, 0, spec.shape[0] if spec.shape else 1)] for name, spec in own.items()}
    view = renamed_view(weights, runs, {name: spec.shape for name, spec in own.items()}) if prefix else weights
    note = f"{component.label}: no config.json beside it, and its tensors do not tell the model: their names stay"
    return replace(component, given_config={}, is_config_certain=False, weights=view, notes=(note,))


def _named_for_recipe(component: SourceComponent, recipe: Recipe) -> SourceComponent:
    """The component under the names that the recipe needs; an assembled one is that of its config."""
    renamed = _renamed(component, recipe)
    if not component.is_assembled:
        return renamed
    markers = component.family.every_marker
    if not (recipe.method == "keep" and DIALECTS[recipe.dialect].renames_tensors):
        refuse_other_model(renamed.weights, component.config, component.config_path, markers)
    note = f"{component.label}: the weights of {component.path.name} instead of those in {component.source.name}"
    return replace(renamed, notes=(note, *renamed.notes))


def _renamed(component: SourceComponent, recipe: Recipe) -> SourceComponent:
    """Gives tensors diffusers' names, from which every method starts, or those of the dialect in which they stay."""
    is_kept = recipe.method == "keep" and bool(component.opened.layers)
    if is_kept and DIALECTS[recipe.dialect].renames_tensors:
        if component.served_family is None or component.stage is not None:
            return component
        opened, notes = layers_under_names_of_readers(component.opened, component.config, DIALECTS[recipe.dialect])
        return replace(component, opened=opened, weights=plain_weights(opened), notes=(*component.notes, *notes))
    dialect = component.opened.dialect
    has_other_names = dialect is not None and (
        DIALECTS[dialect].renames_tensors or DIALECTS[dialect].names_expected == "both"
    )
    if component.name and not component.is_assembled and not has_other_names:
        return component
    is_for_diffusers = is_kept and DIALECTS[recipe.dialect].names_expected == "diffusers"
    if not component.has_config:
        return replace(component, notes=_unknown_names(component)) if is_for_diffusers else component
    if is_kept:
        if not is_for_diffusers:
            return component
        opened, notes = layers_under_diffusers_names(component.opened, component.config)
        return replace(component, opened=opened, weights=plain_weights(opened), notes=(*component.notes, *notes))
    keeps_spare = _may_have_other_names(recipe)
    weights, notes = under_diffusers_names(component.weights, component.config, dialect, keeps_spare=keeps_spare)
    return replace(component, weights=weights, notes=(*component.notes, *notes))


def _unknown_names(component: SourceComponent) -> tuple[str, ...]:
    if not may_have_original_names(component.opened.checkpoint):
        return ()
    return (
        f"{component.label}: names of tensors stay as they are, since there is no config.json that names the model; if "
        "they are the model's original names, add the config.json of its transformer in diffusers",
    )


def _baked(
    component: SourceComponent,
    requests: Sequence[LoraRequest],
    parts: Mapping[Path, Collection[str | None]],
    recipe: Recipe,
) -> SourceComponent:
    if recipe.method == "keep" and component.opened.layers:
        raise RecipeError(
            f"--lora: found with -m keep on {component.counted_layers}, whose values it would change; use "
            "-m METHOD, which quantizes them again, or `omni-convert dequantize --lora`"
        )
    weights, loras = bake(component.weights, requests, component.model_class, parts=parts, force=recipe.force)
    own = (note for lora in loras for note in (_lora_note(lora, component.label), *lora.notes))
    notes = (*component.notes, *own)
    return replace(component, weights=weights, loras=tuple(loras), notes=notes)


def _lora_note(lora: Lora, name: str) -> str:
    count = counted(len(lora.left_out), "tensor")
    left_out = f"; left out {count} for which there is no match" if lora.left_out else ""
    return f"{lora.request.path.name}: baked into {counted(len(lora.changes), 'tensor')} of {name}{left_out}"
