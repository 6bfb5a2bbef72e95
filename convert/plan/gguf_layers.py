"""Which layers of a model a GGUF file holds quantized, and what the file calls the model."""

from __future__ import annotations

from pathlib import Path

from omni_convert.convert.plan.gguf_names import GgufNames
from omni_convert.convert.plan.selection import reasons_to_keep
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.family import GgufFacts
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches
from omni_convert.formats.families.table import find_family
from omni_convert.formats.gguf import DEFAULT_TYPE, Gguf

__all__ = ["SMALL_ELEMENTS", "choose_gguf"]

GENERIC = find_family("")  # linears in blocks: what ComfyUI-GGUF keeps of any family is outside of them
STORABLE_BYTES = 2  # what is narrower is no plain float
#: ComfyUI-GGUF wants tensors of so many elements or fewer in float32, whatever the type of the rest.
SMALL_ELEMENTS = 1024


def choose_gguf(
    checkpoint: Checkpoint, names: GgufNames, where: Path, facts: GgufFacts, recipe: Recipe
) -> tuple[list[LayerGroup], list[tuple[LayerGroup, str]]]:
    """Layers to quantize, and layers that stay, each with the reason; every layer is a group by itself.

    A layer of the file that joins several of diffusers' is quantized if all of them may be.

    Args:
        checkpoint: the model under diffusers' names
        names: what the file calls its tensors
        where: what to name in errors
        facts: what readers of GGUF files expect of the family

    Raises:
        RecipeError: no layer is left to quantize, or a pattern of the recipe matches none.
    """
    layers = _layers(names)
    known = {name for stem, parts in layers.items() for name in (stem, *parts)}
    reasons_to_keep(recipe.ignored_layers, (), known)  # raises where a pattern matches nothing
    fmt = Gguf(recipe.gguf_type or DEFAULT_TYPE)
    quantizable = {stem for group in GENERIC.layer_groups(checkpoint, "diffusers") for stem in group.members}
    chosen: list[LayerGroup] = []
    kept: list[tuple[LayerGroup, str]] = []
    for stem, parts in layers.items():
        if not all(part in quantizable and _is_plain(checkpoint[f"{part}{WEIGHT}"]) for part in parts):
            continue
        group = LayerGroup(stem, (stem,), is_fused=False)
        pattern = next((p for p in recipe.ignored_layers if any(matches(p, name) for name in (stem, *parts))), None)
        reason = f"ignored by '{pattern}'" if pattern is not None else None
        for part in parts:
            reason = reason or _reason_to_keep(checkpoint[f"{part}{WEIGHT}"], fmt, facts)
        if reason is None:
            chosen.append(group)
        else:
            kept.append((group, reason))
    if not chosen:
        raise RecipeError(f"{where}: found no layer to quantize to {fmt.label}, expected linears in blocks")
    return chosen, kept


def _layers(names: GgufNames) -> dict[str, list[str]]:
    """Every layer of the file, and those of diffusers that it consists of."""
    return {
        name.removesuffix(WEIGHT): list(dict.fromkeys(run.source.removesuffix(WEIGHT) for run in runs))
        for name, runs in names.runs.items()
        if name.endswith(WEIGHT)
    }


def _is_plain(spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point and spec.dtype.itemsize >= STORABLE_BYTES


def _reason_to_keep(spec: TensorSpec, fmt: Gguf, facts: GgufFacts) -> str | None:
    reason = fmt.unsupported(*spec.shape)
    if reason is not None:
        return reason
    if any(matches(part, spec.name.removesuffix(WEIGHT)) for part in facts.kept_layers):
        return f"kept by ComfyUI-GGUF's quantizer for {facts.architecture}"
    return f"has {SMALL_ELEMENTS} elements or less" if spec.elements <= SMALL_ELEMENTS else None
