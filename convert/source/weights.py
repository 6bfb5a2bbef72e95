"""A component's tensors as plain numbers under diffusers' names, whatever the file holds: the input of every method.

quantized ─► dequantized ─► under diffusers' names ─► with LoRA files baked in
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from omni_convert.convert.recipe import LoraRequest
from omni_convert.convert.source.lora import Lora, read_lora
from omni_convert.convert.source.original_names import (
    has_original_files,
    layers_under_diffusers_names,
    under_diffusers_names,
)
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import counted
from omni_convert.formats.views.base import dequantized_view
from omni_convert.formats.views.lora import LowRank, Update, baked_view
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["as_weights", "bake", "model_class", "renamed", "renamed_layers"]

Named = TypeVar("Named", Checkpoint, QuantizedCheckpoint)


def as_weights(opened: QuantizedCheckpoint) -> Checkpoint:
    """A component in float numbers, whatever its file holds."""
    return dequantized_view(opened) if opened.layers else opened.checkpoint


def renamed(checkpoint: Checkpoint, config: Mapping[str, Any], notes: list[str]) -> Checkpoint:
    """The checkpoint under diffusers' names; as it is, if it has them or nobody knows how to get there.

    Raises:
        CheckpointError: it is not the model that the config describes.
    """
    return _renamed(checkpoint, checkpoint, under_diffusers_names, config, notes)


def renamed_layers(opened: QuantizedCheckpoint, config: Mapping[str, Any], notes: list[str]) -> QuantizedCheckpoint:
    """As `renamed`, of a quantized checkpoint, whose codes and scales stay as they are.

    Raises:
        CheckpointError: it is not the model that the config describes, or a layer would have to change.
    """
    return _renamed(opened, opened.checkpoint, layers_under_diffusers_names, config, notes)


def _renamed(
    given: Named,
    checkpoint: Checkpoint,
    convert: Callable[[Named, Mapping[str, Any], str], tuple[Named, list[str]] | None],
    config: Mapping[str, Any],
    notes: list[str],
) -> Named:
    converted = convert(given, config, model_class(config)) if has_original_files(checkpoint) else None
    if converted is None:
        return given
    changed, unused = converted
    left_out = (
        f"; left out {counted(len(unused), 'tensor')} that the model has no use for, as '{unused[0]}'" if unused else ""
    )
    notes.append(f"{checkpoint.path.name}: renamed by diffusers' own conversion for {model_class(config)}{left_out}")
    return changed


def bake(
    checkpoint: Checkpoint, requests: Sequence[LoraRequest], config: Mapping[str, Any], *, force: bool
) -> tuple[Checkpoint, list[Lora]]:
    """The checkpoint with all the files baked in, in their order, and what they are.

    Raises:
        CheckpointError: a file is damaged, or does not belong to this model.
    """
    loras = [read_lora(request, checkpoint, model_class(config), force=force) for request in requests]
    added: dict[str, list[LowRank | Update]] = {}
    for lora in loras:
        for name, updates in lora.added.items():
            added.setdefault(name, []).extend(updates)
    return (baked_view(checkpoint, added) if added else checkpoint), loras


def model_class(config: Mapping[str, Any]) -> str:
    """The class that a config names, or "unknown"."""
    architectures = config.get("architectures")
    named = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return next((name for name in named if isinstance(name, str) and name), "unknown")
