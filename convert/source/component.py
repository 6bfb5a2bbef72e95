"""A component that is converted: its files as stored, and its weights in plain numbers under diffusers' names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omni_convert.convert.recipe import LoraRequest, Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.location import Source
from omni_convert.convert.source.lora import Lora, bake, check_requests
from omni_convert.convert.source.original_names import (
    layers_under_diffusers_names,
    layers_under_original_names,
    may_have_original_names,
    missing_config,
    refuse_other_model,
    under_diffusers_names,
)
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError, RecipeError, counted, quoted
from omni_convert.formats.views.base import FLOAT8, dequantized_view, marked_view
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["SourceComponent", "cast_tensors", "open_components", "plain_weights"]


@dataclass(frozen=True)
class SourceComponent(ComponentFolder):
    """A component of the model that is converted.

    Attributes:
        opened: its tensors and quantized layers as they are stored, in any dialect
        weights: the input of every method: plain numbers under diffusers' names, with LoRA files baked in
        loras: the LoRA files that are baked in
        notes: notes for the user on how `weights` were derived
    """

    opened: QuantizedCheckpoint
    weights: Checkpoint
    loras: tuple[Lora, ...] = ()
    notes: tuple[str, ...] = ()

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
        if recipe.method == "gguf" or DIALECTS[recipe.dialect].has_original_names:
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
    components = {name: _named_for_recipe(component, recipe) for name, component in components.items()}
    requests, parts = check_requests(recipe.lora, opened)
    components |= {name: _baked(components[name], requests[name], parts, recipe) for name in requests}
    return {name: replace(each, weights=each.marked(each.weights, recipe)) for name, each in components.items()}


def _named_for_recipe(component: SourceComponent, recipe: Recipe) -> SourceComponent:
    """The component under the names that the recipe needs; an assembled one is that of its config."""
    renamed = _renamed(component, recipe)
    if not component.is_assembled:
        return renamed
    markers = component.family.every_marker
    if not (recipe.method == "keep" and DIALECTS[recipe.dialect].has_original_names):
        refuse_other_model(renamed.weights, component.config, component.config_path, markers)
    note = f"{component.label}: the weights of {component.path.name} instead of those in {component.source.name}"
    return replace(renamed, notes=(note, *renamed.notes))


def _renamed(component: SourceComponent, recipe: Recipe) -> SourceComponent:
    """Gives tensors diffusers' names, from which every method starts, or those of the dialect in which they stay."""
    is_kept = recipe.method == "keep" and bool(component.opened.layers)
    if is_kept and DIALECTS[recipe.dialect].has_original_names:
        if component.served_family is None or component.stage is not None:
            return component
        opened, notes = layers_under_original_names(component.opened, component.config)
        return replace(component, opened=opened, weights=plain_weights(opened), notes=tuple(notes))
    dialect = component.opened.dialect
    has_other_names = dialect is not None and (
        DIALECTS[dialect].has_converted_names or DIALECTS[dialect].has_original_names
    )
    if component.name and not component.is_assembled and not has_other_names:
        return component
    is_for_diffusers = is_kept and DIALECTS[recipe.dialect].has_diffusers_names
    if not component.has_config:
        if component.path.is_file() and not recipe.is_transcoding:
            raise missing_config(component.weights, component.config_path)
        return replace(component, notes=_unknown_names(component)) if is_for_diffusers else component
    if is_kept:
        if not is_for_diffusers:
            return component
        opened, notes = layers_under_diffusers_names(component.opened, component.config)
        return replace(component, opened=opened, weights=plain_weights(opened), notes=tuple(notes))
    weights, notes = under_diffusers_names(component.weights, component.config, dialect)
    return replace(component, weights=weights, notes=tuple(notes))


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
