"""A component of the model as it is found: its config, its files, and its weights in plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from omni_convert.convert.recipe import LoraRequest, Recipe
from omni_convert.convert.source.location import Source
from omni_convert.convert.source.lora import Lora, check_requests
from omni_convert.convert.source.original_names import has_original_files, missing_config
from omni_convert.convert.source.weights import as_weights, bake, model_class, renamed, renamed_layers
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.names import COMPANIONS
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.gguf import GGUF
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError, RecipeError, counted, quoted
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.table import find_family
from omni_convert.formats.views.opened import QuantizedCheckpoint, read_quantized

__all__ = ["SourceComponent", "component_config", "open_component", "open_components"]


INTEGER_CODES = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class SourceComponent:
    """A component of the model.

    Attributes:
        name: its folder, or "" for a model that is a single component
        opened: its files, in whatever spelling
        weights: what every method starts from: plain numbers under diffusers' names, with LoRA files baked in
        loras: the files that are baked in
        notes: what the user should know of how `weights` came about
    """

    source: Source
    name: str
    opened: QuantizedCheckpoint
    weights: Checkpoint
    loras: tuple[Lora, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What to call it in notes."""
        return self.name or self.source.name

    @property
    def config_path(self) -> Path:
        return _config_path(self.source, self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; raises CheckpointError if it is missing or damaged."""
        return read_json(self.config_path)

    @property
    def has_config(self) -> bool:
        return self.config_path.is_file()

    @cached_property
    def family(self) -> Family:
        """Of its config."""
        return find_family(model_class(self.config))

    @property
    def is_denoiser(self) -> bool:
        return self.name in DENOISERS

    @cached_property
    def is_transformers(self) -> bool:
        """Whether transformers loads it, else diffusers."""
        return bool(self.name) and self.source.components()[self.name] == "transformers"

    @property
    def is_changed(self) -> bool:
        """Whether a conversion that quantizes nothing has something to do here."""
        return (
            bool(self.opened.layers) or self.opened.dialect == GGUF.name or self.weights is not self.opened.checkpoint
        )

    @property
    def counted_layers(self) -> str:
        """`24 layers (nvfp4 as modelopt spells it)`."""
        labels = dict.fromkeys(layer.format.label for layer in self.opened.layers.values())
        return f"{len(self.opened.layers)} layers ({', '.join(labels)} as {self.opened.dialect} spells it)"

    def refuse_unread(self) -> None:
        """Raises CheckpointError if it is quantized in a way that nobody here reads, or a layer's scale is gone."""
        for name, spec in self.weights.items():
            if name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in INTEGER_CODES:
                scales = [leaf for leaf in COMPANIONS if f"{name.removesuffix('weight')}{leaf}" in self.weights]
                found = f"with {', '.join(scales)} and nothing that says what they are" if scales else "and no scale"
                raise CheckpointError(
                    f"{self.weights.path}: tensor {quoted(name)}: found {DTYPE_NAMES[spec.dtype]} codes {found}, "
                    f"expected {'a format' if scales else 'both'}; `omni-convert verify` tells what is wrong with the "
                    "file"
                )
        block = self.config.get("quantization_config") if self.has_config else None
        if block and not self.opened.layers:
            kind = block.get("quant_method") if isinstance(block, dict) else type(block).__name__
            raise CheckpointError(
                f"{self.config_path}: found a model quantized already ({quoted(str(kind))}) and no layer that can be "
                "read here, expected the original weights"
            )


def open_component(source: Source, name: str) -> QuantizedCheckpoint:
    """A component of the model ("" for a model that is one), whatever it is spelled in.

    Raises:
        CheckpointError: its files are damaged, or not what they say.
    """
    path = source.path / name if name else source.path
    checkpoint = Checkpoint.open(path, _streamed_files(source, name))
    return read_quantized(checkpoint, path if path.is_dir() else path.parent)


def open_components(source: Source, names: Iterable[str], recipe: Recipe) -> dict[str, SourceComponent]:
    """Components by name, each as plain numbers under diffusers' names with the recipe's LoRA files baked in.

    Raises:
        CheckpointError: a file is damaged, or is not of the model that the config describes.
        RecipeError: a LoRA file is for no component, or would change what is to be kept.
    """
    opened = {name: open_component(source, name) for name in names}
    components = {name: SourceComponent(source, name, opened[name], as_weights(opened[name])) for name in opened}
    components = {name: _under_diffusers_names(component, recipe) for name, component in components.items()}
    requests = check_requests(recipe.lora, dict.fromkeys(opened, recipe.method))
    return components | {name: _baked(components[name], requests[name], recipe) for name in requests}


def component_config(source: Source, name: str) -> dict[str, Any]:
    """config.json of a component; raises CheckpointError if it is missing or damaged."""
    return read_json(_config_path(source, name))


def _config_path(source: Source, name: str) -> Path:
    folder = source.path / name if name else source.path
    return (folder if folder.is_dir() else folder.parent) / "config.json"


def _under_diffusers_names(component: SourceComponent, recipe: Recipe) -> SourceComponent:
    """A component that is the whole model may have the names of the model's own code, and one in GGUF."""
    if component.name and component.opened.dialect != GGUF.name:
        return component
    is_kept = recipe.method == "keep" and bool(component.opened.layers)
    is_for_diffusers = is_kept and DIALECTS[recipe.dialect].has_diffusers_names
    if not component.has_config:
        if component.source.path.is_file() and not recipe.is_transcoding:
            raise missing_config(component.weights, component.config_path)
        return replace(component, notes=_unknown_names(component)) if is_for_diffusers else component
    notes: list[str] = []
    if is_kept:
        if not is_for_diffusers:
            return component
        opened = renamed_layers(component.opened, component.config, notes)
        return replace(component, opened=opened, weights=as_weights(opened), notes=tuple(notes))
    weights = renamed(component.weights, component.config, notes)
    return replace(component, weights=weights, notes=tuple(notes))


def _unknown_names(component: SourceComponent) -> tuple[str, ...]:
    if not has_original_files(component.opened.checkpoint):
        return ()
    return (
        f"{component.label}: names of tensors stay as they are, since no config.json beside it says which model it is; "
        "if they are those of the model's own code, put that of its transformer in diffusers there",
    )


def _baked(component: SourceComponent, requests: Iterable[LoraRequest], recipe: Recipe) -> SourceComponent:
    if recipe.method == "keep" and component.opened.layers:
        raise RecipeError(
            f"--lora: found with -m keep on {component.counted_layers}, whose values it would change; use "
            "-m METHOD, which quantizes them again, or `omni-convert dequantize --lora`"
        )
    config: Mapping[str, Any] = component.config if component.has_config else {}
    weights, loras = bake(component.weights, list(requests), config, force=recipe.force)
    notes = (*component.notes, *(_lora_note(lora, component.label) for lora in loras))
    return replace(component, weights=weights, loras=tuple(loras), notes=notes)


def _lora_note(lora: Lora, name: str) -> str:
    count = counted(len(lora.left_out), "tensor")
    left_out = f"; left out {count} for which there is no match" if lora.left_out else ""
    return f"{lora.request.path.name}: baked into {counted(len(lora.added), 'tensor')} of {name}{left_out}"


def _streamed_files(source: Source, name: str) -> dict[str, Callable[[], TensorFile]]:
    """The weights of a component that are still on the Hub."""
    if source.hub_files is None:
        return {}
    from omni_convert.convert.source.streamed_file import StreamedFile

    streamed = [PurePosixPath(file) for file in source.hub_files.streamed]
    return {
        file.name: partial(StreamedFile, source.hub_files, str(file))
        for file in streamed
        if file.parent == PurePosixPath(name)
    }
