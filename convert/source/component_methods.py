"""Decides which components of a model are converted, and by which method."""

from __future__ import annotations

from collections.abc import Collection

from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.errors import RecipeError, did_you_mean

__all__ = ["component_methods"]


def component_methods(source: Source, recipe: Recipe) -> dict[str, str]:
    """The method of each component that is converted, by name; {"": method} for a model that is no pipeline.

    Raises:
        RecipeError: the recipe names a component that the model does not have, or no component is left.
    """
    if not source.is_pipeline:
        if recipe.component:
            raise RecipeError(f"--component: found {next(iter(recipe.component))}, but {source.path} has no components")
        return {"": recipe.method}
    present = source.components
    for name in recipe.component:
        if name not in present:
            raise RecipeError(
                f"--component: found '{name}', expected one of {', '.join(present)}{did_you_mean(name, present)}"
            )
    if recipe.is_transcoding:
        return _transcoded_components(source, recipe, present)
    files = dict.fromkeys(recipe.component_files, recipe.method)
    methods = {name: recipe.method for name in DENOISERS if name in present} | files | recipe.component_methods
    if not any(method != "none" for method in methods.values()):
        raise RecipeError(f"{source.name}: no component to quantize; name one with --component NAME=METHOD")
    return {name: method for name, method in methods.items() if method != "none"}


def _transcoded_components(source: Source, recipe: Recipe, present: Collection[str]) -> dict[str, str]:
    """Components that may be quantized already: those whose config says so, and the denoisers, whose files may."""
    for name, method in recipe.component_methods.items():
        if method != "none":
            raise RecipeError(
                f"--component {name}={method}: found with -m {recipe.method}, expected {name}=none or nothing"
            )
    folders = [ComponentFolder(source, name) for name in present if name not in recipe.component_methods]
    return {
        folder.name: recipe.method
        for folder in folders
        if folder.is_assembled
        or (folder.path.is_dir() and (folder.is_denoiser or folder.config_if_any.get("quantization_config")))
    }
