"""Chooses the names in a file: diffusers', or the original ones of the model's own code.

ComfyUI, ComfyUI-GGUF, stable-diffusion.cpp and vLLM's GGUF plugin know the original names, and no others; diffusers
converts them when it loads a GGUF file. Before one is written, that conversion is traced with row numbers as values,
since some conversions work for one width only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.recipe import Recipe
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import Run
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.original_names import OriginalTensor
from omni_convert.formats.families.table import find_family, model_class
from omni_convert.formats.views.columns import CutPart, cut_layers
from omni_convert.formats.views.original_names import loads_single_files, trace_conversion
from omni_convert.formats.views.renamed import renamed_view

__all__ = ["FileNames", "gguf_names", "names_of_readers"]

ORIGINAL, DIFFUSERS = "original", "diffusers"
FOR_OTHERS = "ComfyUI-GGUF and stable-diffusion.cpp"
OWN_NAMES = "the names of the model's own code"


@dataclass(frozen=True)
class FileNames:
    """A model under the names that its file has.

    Attributes:
        checkpoint: its tensors
        runs: tensor → the rows of diffusers' tensors that it consists of
        note: which names these are
        is_for_diffusers: diffusers loads a GGUF file with them, as long as it loads this model from single files
        cut: stem of each layer that holds some columns of a layer of diffusers → which
    """

    checkpoint: Checkpoint
    runs: Mapping[str, list[Run]]
    note: str
    is_for_diffusers: bool = True
    cut: Mapping[str, CutPart] = field(default_factory=dict)

    def written(self, group: LayerGroup) -> LayerGroup:
        """A group of diffusers' layers as the file holds it."""
        stems = tuple(dict.fromkeys(stem for member in group.members for stem in self._layers_of[member]))
        if self.layers.get(group.runtime_name) == group.members:
            stems = (group.runtime_name,)
        return replace(group, members=stems, is_fused=group.is_fused and len(stems) == len(group.members))

    def joined(self, groups: Sequence[LayerGroup]) -> list[LayerGroup]:
        """The groups; those whose layers the file joins are replaced by one for each joined layer.

        Parts that are in no group cannot be quantized, nor can the layer that holds them.
        """
        group_of = {member: group for group in groups for member in group.members}
        result: dict[str, LayerGroup] = {}
        for group in groups:
            layers = {stem: self.layers[stem] for member in group.members for stem in self._layers_of[member]}
            if all(len(parts) == 1 for parts in layers.values()) and self.cut.keys().isdisjoint(layers):
                result[group.runtime_name] = group
                continue
            for stem, parts in layers.items():
                if group_of.keys() >= {*parts}:
                    reasons = filter(None, (group_of[part].keep_reason for part in parts))
                    result[stem] = LayerGroup(stem, parts, False, next(reasons, None), group.stack)
        return list(result.values())

    @cached_property
    def _layers_of(self) -> dict[str, list[str]]:
        """Stem of every layer of diffusers → the stems of the layers in the file that hold it: two if it is cut."""
        found: dict[str, list[str]] = {}
        for stem, parts in self.layers.items():
            for part in parts:
                found.setdefault(part, []).append(stem)
        return found

    @cached_property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stem of every layer in the file → the stems of diffusers' layers that it consists of."""
        return {
            name.removesuffix(WEIGHT): tuple(dict.fromkeys(self._whole(run.source) for run in runs))
            for name, runs in self.runs.items()
            if name.endswith(WEIGHT)
        }

    def columns_of(self, stem: str) -> tuple[int, int] | None:
        """The columns of a layer of diffusers that a layer in the file holds; None for all of them."""
        return self.cut[stem].columns if stem in self.cut else None

    def _whole(self, weight: str) -> str:
        """The stem of the layer of diffusers to which a weight belongs."""
        stem = weight.removesuffix(WEIGHT)
        return self.cut[stem].layer if stem in self.cut else stem


def gguf_names(checkpoint: Checkpoint, config: Mapping[str, Any], recipe: Recipe) -> FileNames:
    """The model under its original names, or under diffusers'.

    Args:
        checkpoint: the model under diffusers' names
        config: of the model

    Raises:
        RecipeError: the recipe wants original names, and nobody here knows them, or diffusers would not read them.
    """
    kind, wanted = model_class(config), recipe.gguf_names
    family = find_family(kind)
    if wanted == DIFFUSERS or family.has_original_names:
        same = ", which are its original ones" if family.has_original_names else ""
        return _of_diffusers(checkpoint, f"diffusers' names{same}")
    tensors = family.original_tensors(checkpoint)
    if tensors is None:
        reason = f"the original names of {kind} are not all known here"
        if wanted == ORIGINAL:
            raise RecipeError(f"--gguf-names original: found that {reason}, expected --gguf-names diffusers")
        return _of_diffusers(checkpoint, f"diffusers' names, since {reason}")
    prefixed = {f"{family.gguf.prefix}{name}": tensor for name, tensor in tensors.items()}
    if not loads_single_files(kind):
        return _original(checkpoint, prefixed, f"{OWN_NAMES}, for {FOR_OTHERS} alone", False)
    trouble = _trouble(checkpoint, prefixed, config)
    if trouble is None:
        return _original(checkpoint, prefixed, f"{OWN_NAMES}, which diffusers converts when it loads the file")
    reason = f"diffusers would not load this model under its original ones: {trouble}"
    if wanted == ORIGINAL and recipe.force:
        return _original(checkpoint, prefixed, f"{OWN_NAMES}, for {FOR_OTHERS} alone: {reason}", False)
    remedy = f"--gguf-names original --force writes them for {FOR_OTHERS} alone"
    if wanted == ORIGINAL:
        raise RecipeError(f"--gguf-names original: found that {reason}; {remedy}")
    return _of_diffusers(checkpoint, f"diffusers' names, since {reason}; {remedy}")


def names_of_readers(checkpoint: Checkpoint, config: Mapping[str, Any], recipe: Recipe) -> FileNames:
    """The model under the names that the readers of the recipe's dialect know.

    Args:
        checkpoint: the model under diffusers' names
        config: of the model

    Raises:
        RecipeError: nobody here knows them.
    """
    kind, dialect = model_class(config), DIALECTS[recipe.dialect]
    family = find_family(kind)
    if dialect.names_expected == "original" and family.has_original_names:
        return _of_diffusers(checkpoint, "diffusers' names, which are its original ones")
    view, cut = cut_layers(checkpoint, dialect.cuts(family))
    tensors = dialect.tensors_of(family, view)
    if tensors is not None:
        note = OWN_NAMES if dialect.names_expected == "original" else f"the names of {dialect.consumers}"
        return replace(_original(view, tensors, note, False), cut=cut)
    if recipe.force:
        return _of_diffusers(checkpoint, f"diffusers' names: ComfyUI's names of {kind} are not all known here")
    raise RecipeError(
        f"--dialect comfyui: found {kind}, whose tensors' names in ComfyUI are not all known here, expected a model of "
        "which they are; --force writes diffusers' names, of which ComfyUI cannot split quantized layers"
    )


def _of_diffusers(checkpoint: Checkpoint, note: str) -> FileNames:
    runs = {name: [Run(name, 0, spec.shape[0] if spec.shape else 1)] for name, spec in checkpoint.items()}
    return FileNames(checkpoint, runs, note)


def _original(
    checkpoint: Checkpoint, tensors: Mapping[str, OriginalTensor], note: str, is_for_diffusers: bool = True
) -> FileNames:
    runs = {name: tensor.runs for name, tensor in tensors.items()}
    view = renamed_view(checkpoint, runs, {name: tensor.shape for name, tensor in tensors.items()}, widens=True)
    return FileNames(view, runs, note, is_for_diffusers)


def _trouble(checkpoint: Checkpoint, tensors: Mapping[str, OriginalTensor], config: Mapping[str, Any]) -> str | None:
    """Why diffusers' conversion does not restore the tensors, or None."""

    def joined(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _joined(numbers, tensor) for name, tensor in tensors.items()}

    try:
        back = trace_conversion(checkpoint, config, joined)
    except CheckpointError as error:
        return str(error)
    assert back is not None, "it loads single files"
    family = find_family(model_class(config))
    names = {name for name in back.keys() | checkpoint.keys() if not family.is_spare(name)}
    differing = sorted(name for name in names if not _is_whole(back, checkpoint, name))
    return f"it makes something else of '{differing[0]}'" if differing else None


def _joined(numbers: Mapping[str, Tensor], tensor: OriginalTensor) -> Tensor:
    rows = [numbers[run.source] for run in tensor.runs]
    if not rows[0].dim():
        return rows[0]
    joined = torch.cat([part[run.start : run.start + run.count] for part, run in zip(rows, tensor.runs, strict=True)])
    return joined.reshape(tensor.shape) if joined.numel() == math.prod(tensor.shape) else joined


def _is_whole(back: Mapping[str, list[Run]], checkpoint: Checkpoint, name: str) -> bool:
    shape = checkpoint[name].shape if name in checkpoint else ()
    return back.get(name) == [Run(name, 0, shape[0] if shape else 1)]
