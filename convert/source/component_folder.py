"""A component of a model on the disk: its folder, its config and class, its files, and its entry in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

from omni_convert.convert.source.location import Source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.stage import Stage, without_block
from omni_convert.formats.families.table import find_family, model_class, repository_class
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["MANIFEST", "ComponentFolder", "folders_with_weights"]

#: The manifest that a conversion leaves beside the model.
MANIFEST = "omni_convert.json"
# `_class_name` in configs that are not for diffusers → whose class it is.
OWN_CLASSES = {"WanModel": "Wan's"}
WEIGHT_PATTERNS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True)
class ComponentFolder:
    """A component of a model.

    Attributes:
        source: the model
        name: the component's folder, or "" for a model that is a single component
        given_config: its config from elsewhere than its folder, or None
    """

    source: Source
    name: str
    given_config: Mapping[str, Any] | None = field(default=None, kw_only=True)

    @property
    def is_assembled(self) -> bool:
        """Whether its weights are in a file that the user names, and not in the model's folder."""
        return self.name in self.source.files

    @property
    def path(self) -> Path:
        """Its folder, or its file of weights if it is assembled or is the whole model."""
        if self.is_assembled:
            return self.source.files[self.name]
        return self.source.path / self.name if self.name else self.source.path

    @property
    def folder(self) -> Path:
        """The folder of its config."""
        if self.is_assembled:
            return self.source.path / self.name
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def label(self) -> str:
        """Its name in notes."""
        return self.name or self.source.name

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def has_config(self) -> bool:
        return self.given_config is not None or self.config_path.is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; raises CheckpointError if that is missing or damaged.

        The block of weights that are not taken is left out.
        """
        config = dict(self.given_config) if self.given_config is not None else read_json(self.config_path)
        return without_block(config) if self.is_assembled else config

    @property
    def config_if_any(self) -> dict[str, Any]:
        """Its config.json, or {} if there is none; raises CheckpointError if it is damaged."""
        return self.config if self.has_config else {}

    @cached_property
    def model_class(self) -> str:
        """The class that its config names, or "unknown"; the model's own where a repository has another's config."""
        named = model_class(self.config_if_any)
        return named if self.name else repository_class(named, self._has_tensor)

    def _has_tensor(self, name: str) -> bool:
        if not self.has_weights:
            return False
        with self.checkpoint() as checkpoint:
            return name in checkpoint

    @cached_property
    def family(self) -> Family:
        """The family of its class.

        Raises:
            CheckpointError: its config is missing or damaged, or of the model's own code.
        """
        name = model_class(self.config)
        if name in OWN_CLASSES:
            raise CheckpointError(
                f"{self.config_path}: found {name}, the class of {OWN_CLASSES[name]} own code, expected a model of "
                "diffusers; use the repository whose name ends in -Diffusers, with --component transformer="
                f"{self.folder} if these are its weights"
            )
        return find_family(self.model_class)

    @property
    def served_family(self) -> Family | None:
        """The family of its class; None unless that is a class of diffusers, or a repository with stages."""
        class_name = self.config_if_any.get("_class_name")
        if isinstance(class_name, str):
            return find_family(class_name)
        return find_family(self.model_class) if self.stage is not None else None

    @property
    def stage(self) -> Stage | None:
        """The stage that vLLM-Omni builds quantized, in a repository of transformers; None for other models."""
        return None if self.name else find_family(self.model_class).stage

    @property
    def is_denoiser(self) -> bool:
        return self.name in DENOISERS

    @property
    def is_transformers(self) -> bool:
        """Whether transformers loads it, not diffusers; a model by itself says so in its config."""
        if self.name:
            return self.source.components[self.name] == "transformers"
        config = self.config_if_any
        return "_class_name" not in config and ("architectures" in config or "model_type" in config)

    @property
    def is_encoder(self) -> bool:
        """Whether transformers loads it, and vLLM-Omni builds no stage of it quantized."""
        return self.is_transformers and self.stage is None

    @property
    def has_weights(self) -> bool:
        on_hub = self.source.hub_files.streamed if self.source.hub_files is not None else ()
        return bool(self.weight_files()) or any(file.startswith(f"{self.name}/") for file in on_hub)

    def weight_files(self) -> list[Path]:
        """Files of weights on the disk, whether or not they belong together."""
        if not self.path.is_dir():
            return [self.path] if self.path.is_file() else []
        return [file for pattern in WEIGHT_PATTERNS for file in self.path.glob(pattern)]

    def checkpoint(self) -> Checkpoint:
        """Its tensors as they are stored; raises CheckpointError if a file is damaged."""
        return Checkpoint.open(self.path, self._streamed_files())

    def open(self, *, values: bool = False) -> QuantizedCheckpoint:
        """Its tensors and quantized layers, in any dialect.

        Args:
            values: whether to read some rows to make sure of their meaning

        Raises:
            CheckpointError: a file is damaged, or its meaning is not certain.
        """
        return open_quantized(self.path, self._streamed_files(), values=values)

    def _streamed_files(self) -> dict[str, Callable[[], TensorFile]]:
        return {} if self.is_assembled else _streamed_files(self.source, self.name)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest of the model, or {} if there is none or it is damaged, which the check of files reports."""
        return _manifest(self.source.path)

    @cached_property
    def manifest_entry(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The recipe of the conversion that wrote it and what the manifest says of it; ({}, {}) if nothing does."""
        for folder, name in ((self.folder, ""), (self.folder.parent, self.folder.name)):
            manifest = _manifest(folder)
            recipe, components = manifest.get("recipe"), manifest.get("components")
            entry = components.get(name) if isinstance(components, dict) else None
            if isinstance(recipe, dict) and isinstance(entry, dict):
                return recipe, entry
        return {}, {}


def folders_with_weights(source: Source) -> list[ComponentFolder]:
    """The components that have weights; the only one of a model that is no pipeline.

    Raises:
        CheckpointError: no component has weights.
    """
    if not source.is_pipeline:
        return [ComponentFolder(source, "")]
    found = [folder for name in source.components if (folder := ComponentFolder(source, name)).has_weights]
    if not found:
        raise CheckpointError(f"{source.path}: found no component with .safetensors or .gguf files, expected some")
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _streamed_files(source: Source, name: str) -> dict[str, Callable[[], TensorFile]]:
    """The weights of a component that are still on the Hub."""
    if source.hub_files is None:
        return {}
    from omni_convert.convert.source.streamed_file import StreamedFile  # the Hub's client, for nobody else

    streamed = [PurePosixPath(file) for file in source.hub_files.streamed]
    return {
        file.name: partial(StreamedFile, source.hub_files, str(file))
        for file in streamed
        if file.parent == PurePosixPath(name)
    }
