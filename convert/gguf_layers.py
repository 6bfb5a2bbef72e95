"""Which layers of a model a GGUF file holds quantized, and what the file calls the model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from omni_convert.convert.recipe import Recipe
from omni_convert.formats.checkpoint import Checkpoint
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.family import LayerGroup, find_family
from omni_convert.formats.gguf import DEFAULT_TYPE, Gguf
from omni_convert.formats.layer_pattern import matches
from omni_convert.formats.wan_names import original_name

__all__ = ["choose_gguf", "original_names"]

GENERIC = find_family("")  # linears in blocks: what ComfyUI-GGUF keeps of any family is outside of them
# Architecture → layers in blocks that ComfyUI-GGUF's quantizer keeps, too.
KEPT = {"lumina2": ("noise_refiner", "context_refiner"), "hidream": ("gate",), "wan": ("condition_embedder",)}
STORABLE_BYTES = 2  # what is narrower is no plain float
# ComfyUI-GGUF reads these in float32, whatever the type of the rest.
SMALL_ELEMENTS = 1024


def original_names(model_class: str, tensors: Collection[str]) -> dict[str, str]:
    """Tensor → its name in the model's own code, which ComfyUI expects; {} where only diffusers' are known.

    Qwen-Image has no other names than diffusers'.
    """
    if model_class != "WanTransformer3DModel":
        return {}
    names = {name: original for name in tensors if (original := original_name(name)) is not None}
    return names if len(names) == len(tensors) else {}


def choose_gguf(
    checkpoint: Checkpoint, where: Path, architecture: str, recipe: Recipe
) -> tuple[list[LayerGroup], list[tuple[LayerGroup, str]]]:
    """Layers to quantize, and layers that stay, each with the reason; every layer is a group by itself.

    Args:
        where: what to name in errors
        architecture: `general.architecture`

    Raises:
        RecipeError: no layer is left to quantize.
    """
    fmt = Gguf(recipe.gguf_type or DEFAULT_TYPE)
    chosen: list[LayerGroup] = []
    kept: list[tuple[LayerGroup, str]] = []
    for stem in (stem for group in GENERIC.layer_groups(checkpoint, "diffusers") for stem in group.members):
        spec = checkpoint[f"{stem}.weight"]
        if not spec.dtype.is_floating_point or spec.dtype.itemsize < STORABLE_BYTES:
            continue
        group = LayerGroup(stem, (stem,), is_fused=False)
        pattern = next((pattern for pattern in recipe.ignored_layers if matches(pattern, stem)), None)
        reason = f"ignored by '{pattern}'" if pattern is not None else fmt.unsupported(*spec.shape)
        if reason is None and any(matches(part, stem) for part in KEPT.get(architecture, ())):
            reason = f"kept by ComfyUI-GGUF's quantizer for {architecture}"
        if reason is None and spec.elements <= SMALL_ELEMENTS:
            reason = f"has {SMALL_ELEMENTS} elements or less"
        if reason is None:
            chosen.append(group)
        else:
            kept.append((group, reason))
    if not chosen:
        raise RecipeError(f"{where}: found no layer to quantize to {fmt.label}, expected linears in blocks")
    return chosen, kept
