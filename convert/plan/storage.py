"""Which layers of a text encoder or a VAE are stored as FP8 and dequantized before use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omni_convert.convert.recipe import Recipe
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches
from omni_convert.formats.families.table import find_family

__all__ = ["choose_stored"]

GENERIC = find_family("")  # the rule by names alone
STORABLE_BYTES = 2  # what is narrower is no plain float


def choose_stored(
    checkpoint: Checkpoint, where: Path, config: Mapping[str, Any], recipe: Recipe, *, is_transformers: bool
) -> tuple[list[LayerGroup], list[tuple[LayerGroup, str]]]:
    """Layers to store, and layers that stay, each with the reason; every layer is a group by itself.

    Of a diffusers model these are all linears and 2- and 3-dimensional convolutions; of a transformers model, whose
    checkpoint may call its layers otherwise than its class does, the linears in its blocks.

    Args:
        where: what to name in errors

    Raises:
        RecipeError: no layer is left to store.
        CheckpointError: the config does not fit the model's class.
    """
    stems = _linears_in_blocks(checkpoint) if is_transformers else _layers_of_class(where, config)
    chosen: list[LayerGroup] = []
    kept: list[tuple[LayerGroup, str]] = []
    for stem in stems:
        spec = checkpoint.get(f"{stem}.weight")
        if spec is None or not spec.dtype.is_floating_point or spec.dtype.itemsize < STORABLE_BYTES:
            continue
        group = LayerGroup(stem, (stem,), is_fused=False)
        pattern = next((pattern for pattern in recipe.ignored_layers if matches(pattern, stem)), None)
        if pattern is None:
            chosen.append(group)
        else:
            kept.append((group, f"ignored by '{pattern}'"))
    if not chosen:
        raise RecipeError(f"{where}: found no layer to store as fp8, expected a text encoder or a VAE")
    return chosen, kept


def _linears_in_blocks(checkpoint: Checkpoint) -> list[str]:
    return [stem for group in GENERIC.layer_groups(checkpoint, "diffusers") for stem in group.members]


def _layers_of_class(where: Path, config: Mapping[str, Any]) -> Collection[str]:
    """Asks the class, because names and shapes do not tell a convolution from a transposed one."""
    import diffusers
    import torch

    from omni_convert.loaders.layers.fp8_storage import storage_layers

    name = config.get("_class_name")
    model_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise RecipeError(f"{where}: found class {str(name)[:64]!r}, expected a model of diffusers for fp8_storage")
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with torch.device("meta"):
            model = model_class.from_config(settings)  # type: ignore[attr-defined]  # diffusers is untyped
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(f"{where}: found a config that {name} refuses ({reason}), expected its own") from error
    return storage_layers(model)
