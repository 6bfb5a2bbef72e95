"""What the manifest beside a component says of how it was written, for a component that lost its own word of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni_convert.convert.output.folder import MANIFEST
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["dialect_of_lost_block"]


def dialect_of_lost_block(quantized: QuantizedCheckpoint, path: Path) -> str | None:
    """The dialect that a component was written in whose tensors alone are left to tell; None for all others.

    Args:
        path: the component's folder, or its file
    """
    if quantized.block or (quantized.dialect is not None and DIALECTS[quantized.dialect].declared_by != "nothing"):
        return None
    folder = path if path.is_dir() else path.parent
    recipe = _recorded(folder, "") or _recorded(folder.parent, folder.name)
    dialect = recipe.get("dialect", Recipe.dialect) if recipe is not None else None
    return dialect if dialect in WRITTEN else None


def _recorded(folder: Path, component: str) -> dict[str, Any] | None:
    """The recipe by which a component of the folder was quantized, if it was."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path) if path.is_file() else {}
    except CheckpointError:  # the check of the files reports it
        return None
    components, recipe = manifest.get("components"), manifest.get("recipe")
    described = components.get(component) if isinstance(components, dict) else None
    is_quantized = isinstance(described, dict) and bool(described.get("layers"))
    return recipe if is_quantized and isinstance(recipe, dict) else None
