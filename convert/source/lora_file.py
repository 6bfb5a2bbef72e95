"""Reads a LoRA file: its tensors, sorted by layer and by their role there, and what its header says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, listed

__all__ = ["LayerGroup", "LoraFile", "file_at", "grouped", "open_lora"]

# Files that diffusers' save_lora_weights and PEFT's save_pretrained write into a folder.
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
NAMES_SHOWN = 3

_ADAPTER = r"(?:\.[A-Za-z_]\w*)?"  # PEFT puts the adapter's name there
# Role → the end of a tensor's name. A bare `.down.weight` is XLabs', whose layers end in `_lora`, `_lora1` or `_lora2`.
_ROLES = {
    "down": rf"(?:\.lora_A{_ADAPTER}|\.lora_down|\.lora\.down|\.lora_linear_layer\.down|(?<=_lora)[12]?\.down)\.weight",
    "up": rf"(?:\.lora_B{_ADAPTER}|\.lora_up|\.lora\.up|\.lora_linear_layer\.up|(?<=_lora)[12]?\.up)\.weight",
    "mid": r"\.lora_mid\.weight",
    "up_bias": rf"\.lora_B{_ADAPTER}\.bias",
    "alpha": r"\.alpha",
    "magnitude": rf"\.(?:dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)",
    "difference": r"\.(?:diff|w_norm)",
    "bias_difference": r"\.(?:diff_b|b_norm)",
    "modulation_difference": r"\.diff_m",
    "rotations": r"\.oft_blocks",
    "rescale": r"\.rescale",
    "packed_rotations": rf"\.oft_R{_ADAPTER}\.weight",
    "reshape": r"\.reshape_weight",
    **{
        f"{kind}_{part}": rf"\.{kind}_{part}{_ADAPTER}"
        for kind, parts in {
            "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
            "hada": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
        }.items()
        for part in parts
    },
}
_PATTERNS = {role: re.compile(rf"{end}$") for role, end in _ROLES.items()}
_DIFFERENCES = ("difference", "bias_difference", "modulation_difference")


@dataclass(frozen=True)
class LayerGroup:
    """The tensors of a file for one layer.

    Attributes:
        stem: the layer's name in the file
        tensors: role → tensor
        names: role → the tensor's name in the file
    """

    stem: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file.

    Attributes:
        tensors: name → tensor
        metadata: the header's texts
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]


def file_at(path: Path) -> Path:
    """The path itself if it is a file; the only LoRA of a folder.

    Raises:
        CheckpointError: nothing is there, or the folder has no LoRA or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: file missing, expected a LoRA in a .safetensors file, or a folder with one")
    inside = sorted(path.glob("*.safetensors"))
    found = [file for file in inside if file.name in FILES] or inside
    if len(found) != 1:
        shown = listed([file.name for file in found], NAMES_SHOWN) or "no .safetensors file"
        raise CheckpointError(
            f"{path}: found {shown} in this folder, expected one LoRA, as {' or '.join(FILES)}; name the file"
        )
    return found[0]


def open_lora(path: Path) -> LoraFile:
    """Reads a file.

    Raises:
        CheckpointError: it is damaged, or a number in it is not finite.
    """
    with Checkpoint.open(path) as file:
        tensors = {name: _finite(path, name, file.read(name)) for name in file}
        (reader,) = file.files.values()
        return LoraFile(path, tensors, dict(reader.metadata))


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: tensor '{name}': found NaN or Inf, expected finite numbers")
    return tensor


def grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, LayerGroup], list[str]]:
    """Sorts tensors by layer; returns stem → group, and the names that belong to no algorithm known here.

    Differences of zeros are left out: trainers write them for layers that they do not train.
    """
    groups: dict[str, LayerGroup] = {}
    unknown = []
    for name, tensor in tensors.items():
        stem, role = _split(name)
        if role is None:
            unknown.append(name)
        elif role not in _DIFFERENCES or bool(tensor.any()):
            group = groups.setdefault(stem, LayerGroup(stem))
            group.tensors[role] = tensor
            group.names[role] = name
    return groups, unknown


def _split(name: str) -> tuple[str, str | None]:
    """The layer's name and the role of the tensor, or None if no algorithm known here has such a name."""
    for role, pattern in _PATTERNS.items():
        found = pattern.search(name)
        if found is not None:
            # The lookbehind of XLabs' names leaves `_lora1` in two parts: the number belongs to the layer.
            number = found[0][0] if found[0][0].isdigit() else ""
            return name[: found.start()] + number, role
    return name, None
