"""Chooses the names in a GGUF file: the original ones of the model's own code, if diffusers can convert them back.

ComfyUI-GGUF, stable-diffusion.cpp and vLLM's GGUF plugin know the original names, and no others; diffusers converts
them when it loads a file. Before anything is written, its conversion is traced with row numbers as values, since some
conversions work for one width only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.original_names import trace_conversion
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import Run
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.table import find_family, model_class
from omni_convert.formats.views.renamed import renamed_view

__all__ = ["GgufNames", "choose_names"]

ORIGINAL, DIFFUSERS = "original", "diffusers"
FOR_OTHERS = "ComfyUI-GGUF and stable-diffusion.cpp"


@dataclass(frozen=True)
class GgufNames:
    """A model under the names that its GGUF file has.

    Attributes:
        checkpoint: its tensors
        runs: tensor → the rows of diffusers' tensors that it consists of
        note: which names these are
        is_for_diffusers: diffusers loads a file with them, as long as it loads this model from single files
    """

    checkpoint: Checkpoint
    runs: Mapping[str, list[Run]]
    note: str
    is_for_diffusers: bool = True

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stem of every layer in the file → the stems of diffusers' layers that it consists of."""
        return {
            name.removesuffix(WEIGHT): tuple(dict.fromkeys(run.source.removesuffix(WEIGHT) for run in runs))
            for name, runs in self.runs.items()
            if name.endswith(WEIGHT)
        }


def choose_names(checkpoint: Checkpoint, config: Mapping[str, Any], recipe: Recipe) -> GgufNames:
    """The model under its original names, or under diffusers'.

    Args:
        checkpoint: the model under diffusers' names
        config: of the model

    Raises:
        RecipeError: the recipe wants original names, and nobody here knows them, or diffusers would not read them.
    """
    kind, wanted = model_class(config), recipe.gguf_names
    family = find_family(kind)
    of_diffusers = {name: [Run(name, 0, spec.shape[0] if spec.shape else 1)] for name, spec in checkpoint.items()}
    if wanted == DIFFUSERS or family.has_original_names:
        same = ", which are its original ones" if family.has_original_names else ""
        return GgufNames(checkpoint, of_diffusers, f"diffusers' names{same}")
    runs = family.original_runs(checkpoint)
    if runs is None:
        reason = f"the original ones of {kind} are not all known here"
        if wanted == ORIGINAL:
            raise RecipeError(f"--gguf-names original: found that {reason}, expected --gguf-names diffusers")
        return GgufNames(checkpoint, of_diffusers, f"diffusers' names, since {reason}")
    trouble = _trouble(checkpoint, runs, config)
    view = renamed_view(checkpoint, runs, _shapes(checkpoint, runs), widens=True)
    if trouble is None:
        return GgufNames(view, runs, "its original names, which diffusers converts when it loads the file")
    reason = f"diffusers would not load this model under its original ones: {trouble}"
    if wanted == ORIGINAL and recipe.force:
        return GgufNames(view, runs, f"its original names, for {FOR_OTHERS} alone: {reason}", False)
    remedy = f"--gguf-names original --force writes them for {FOR_OTHERS} alone"
    if wanted == ORIGINAL:
        raise RecipeError(f"--gguf-names original: found that {reason}; {remedy}")
    return GgufNames(checkpoint, of_diffusers, f"diffusers' names, since {reason}; {remedy}")


def _shapes(checkpoint: Checkpoint, runs: Mapping[str, list[Run]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the joined tensors."""
    shapes = {}
    for name, found in runs.items():
        shape = checkpoint[found[0].source].shape
        shapes[name] = (sum(run.count for run in found), *shape[1:]) if shape else shape
    return shapes


def _trouble(checkpoint: Checkpoint, runs: Mapping[str, list[Run]], config: Mapping[str, Any]) -> str | None:
    """Why diffusers' conversion does not restore the tensors, or None."""

    def joined(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _joined(numbers, found) for name, found in runs.items()}

    try:
        back = trace_conversion(checkpoint, config, joined)
    except CheckpointError as error:
        return str(error)
    if back is None:
        return "it has no conversion for it"
    differing = sorted({name for name in back.keys() | checkpoint.keys() if not _is_whole(back, checkpoint, name)})
    return f"it makes something else of '{differing[0]}'" if differing else None


def _joined(numbers: Mapping[str, Tensor], runs: list[Run]) -> Tensor:
    rows = [numbers[run.source] for run in runs]
    if not rows[0].dim():
        return rows[0]
    return torch.cat([part[run.start : run.start + run.count] for part, run in zip(rows, runs, strict=True)])


def _is_whole(back: Mapping[str, list[Run]], checkpoint: Checkpoint, name: str) -> bool:
    shape = checkpoint[name].shape if name in checkpoint else ()
    return back.get(name) == [Run(name, 0, shape[0] if shape else 1)]
