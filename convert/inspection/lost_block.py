"""The dialect of a component that lost its config block, by the manifest beside it."""

from __future__ import annotations

from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["dialect_of_lost_block"]


def dialect_of_lost_block(component: ComponentFolder, opened: QuantizedCheckpoint) -> str | None:
    """The dialect in which a component was written that shows no more than its tensors; None for all others."""
    if opened.block or (opened.dialect is not None and DIALECTS[opened.dialect].declared_by != "nothing"):
        return None
    recipe, entry = component.manifest_entry
    dialect = recipe.get("dialect", Recipe.dialect) if entry.get("layers") else None
    return dialect if dialect in WRITTEN else None
