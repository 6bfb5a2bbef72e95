"""Reads LoRA files and matches each of their tensors with a weight; nothing is left out silently.

file ─► pairs named as PEFT does ─► matched by name and shape with the component's tensors ─► what is added to which
         │ as they are, or through diffusers' own conversion for the family (kohya, ComfyUI, original names)
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.recipe import LoraRequest
from omni_convert.convert.source.file_hash import file_sha256
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError, RecipeError, listed
from omni_convert.formats.views.lora import LowRank, Update, baked_view

__all__ = ["Lora", "bake", "check_requests", "read_lora"]

# The name of a pair's tensors is the layer's name and one suffix from each of these lists.
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
ALPHA = ".alpha"
BIASES = (".lora_B.bias", ".diff_b")
DIFFERENCE = ".diff"
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.")
# kohya's trainers write one of these, and then the layer's name with underscores for dots.
UNDERSCORED = ("lora_unet_", "lora_transformer_")
# PEFT's description of an adapter: beside the file, or in its header as diffusers writes it.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"
# Files that diffusers' save_lora_weights and PEFT's save_pretrained write into a folder.
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Lora:
    """A LoRA file that is matched with a component.

    Attributes:
        added: name of a tensor of the component → the updates that are added to it
        left_out: names in the file that match nothing, which are accepted only with --force
        sha256: SHA-256 of the file
    """

    request: LoraRequest
    added: dict[str, list[LowRank | Update]]
    left_out: tuple[str, ...]
    sha256: str

    @property
    def description(self) -> dict[str, Any]:
        """The entry in the manifest, without paths."""
        return {
            "name": self.request.path.name,
            "sha256": self.sha256,
            "scale": self.request.scale,
            "tensors": len(self.added),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
        }


def bake(
    checkpoint: Checkpoint, requests: Sequence[LoraRequest], model_class: str, *, force: bool
) -> tuple[Checkpoint, list[Lora]]:
    """Bakes LoRA files into a checkpoint in their order; returns the result and the files.

    Raises:
        CheckpointError: a file is damaged, or does not belong to this model.
    """
    loras = [read_lora(request, checkpoint, model_class, force=force) for request in requests]
    added: dict[str, list[LowRank | Update]] = {}
    for lora in loras:
        for name, updates in lora.added.items():
            added.setdefault(name, []).extend(updates)
    return (baked_view(checkpoint, added) if added else checkpoint), loras


def read_lora(
    request: LoraRequest, checkpoint: Mapping[str, TensorSpec], model_class: str, *, force: bool = False
) -> Lora:
    """Matches a file with the tensors of a component.

    Args:
        request: names a file, or a folder with one
        checkpoint: the component's tensors under diffusers' names
        model_class: the component's class, which selects diffusers' conversion of names
        force: leave out tensors that match nothing

    Raises:
        CheckpointError: the file is damaged or is no LoRA, or tensors of it match nothing.
    """
    request = replace(request, path=_file_at(request.path))
    with Checkpoint.open(request.path) as file:
        tensors = {name: _finite(request.path, name, file.read(name)) for name in file}
        (reader,) = file.files.values()
        adapter = _adapter_config(request.path, reader.metadata)
    tensors = {name: tensor for name, tensor in tensors.items() if not _is_empty_difference(name, tensor)}
    _refuse_other_kinds(request.path, tensors)
    added, unmatched = _matched(tensors, checkpoint, request, adapter)
    if unmatched:
        converted = _converted_by_diffusers(request.path, tensors, model_class)
        if converted is not None:
            added, unmatched = _matched(converted, checkpoint, request, adapter)
            _check_complete(request.path, tensors, converted)
    if (unmatched and not force) or not added:
        shown = listed([f"'{name}'" for name in sorted(unmatched)], NAMES_SHOWN)
        match = "matches" if len(unmatched) == 1 else "match"
        remedy = f"; --force leaves {'it' if len(unmatched) == 1 else 'them'} out" if added else ""
        raise CheckpointError(
            f"{request.path}: found {shown}, which {match} no weight of {model_class} by name and shape, "
            f"expected a LoRA of this model{remedy}"
        )
    return Lora(request, added, tuple(sorted(unmatched)), file_sha256(request.path))


def _file_at(path: Path) -> Path:
    """The path itself if it is a file; the only LoRA of a folder."""
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


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: tensor '{name}': found NaN or Inf, expected finite numbers")
    return tensor


def _is_empty_difference(name: str, tensor: Tensor) -> bool:
    """Whether a difference adds nothing: trainers write zeros for layers that they do not train."""
    return name.endswith((DIFFERENCE, ".diff_b")) and not bool(tensor.any())


def _refuse_other_kinds(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        if not name.endswith((*DOWN, *UP, ALPHA, *BIASES, DIFFERENCE)):
            raise CheckpointError(
                f"{path}: found tensor '{name}', expected pairs of low rank (lora_A and lora_B, or lora_down and "
                "lora_up): DoRA, LoKr, LoHa and others are not baked; merge them with the tool that trained them"
            )


def _adapter_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's description of the adapter, without the component's prefix in its keys; {} if there is none."""
    if ADAPTER_METADATA in metadata:
        try:
            described = json.loads(metadata[ADAPTER_METADATA])
        except ValueError:
            described = None
        if not isinstance(described, dict):
            raise CheckpointError(
                f"{path}: found {ADAPTER_METADATA} in the header that is no JSON object, expected one"
            )
        return {key.rpartition(".")[2]: value for key, value in described.items()}
    beside = path.parent / ADAPTER_CONFIG
    return read_json(beside) if beside.is_file() else {}


def _strength(stem: str, rank: int, alpha: Tensor | None, adapter: Mapping[str, Any]) -> float:
    """Alpha over rank, as PEFT computes it; 1 if no alpha is given."""
    if alpha is not None:
        return float(alpha) / rank
    patterns = adapter.get("alpha_pattern") or {}
    matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", stem))
    value = next(matching, adapter.get("lora_alpha"))
    if value is None:
        return 1.0
    return float(value) / (rank**0.5 if adapter.get("use_rslora") else rank)


def _matched(
    tensors: Mapping[str, Tensor],
    checkpoint: Mapping[str, TensorSpec],
    request: LoraRequest,
    adapter: Mapping[str, Any],
) -> tuple[dict[str, list[LowRank | Update]], list[str]]:
    """The updates of each tensor, and the names in the file that match none."""
    added: dict[str, list[LowRank | Update]] = {}
    used: set[str] = set()
    dotted = _dotted(checkpoint)
    for name, tensor in tensors.items():
        stem, leaf = _split(name)
        layer = dotted.get(_bare(stem), _bare(stem))
        if leaf in DOWN:
            partner = stem + UP[DOWN.index(leaf)]
            up, alpha = tensors.get(partner), tensors.get(stem + ALPHA)
            target = _target((stem, layer), "weight", checkpoint)
            if up is None or target is None or not _fits(tensor, up, checkpoint[target]):
                continue
            scale = request.scale * _strength(layer, tensor.shape[0], alpha, adapter)
            added.setdefault(target, []).append(LowRank(tensor.flatten(1), up.flatten(1), scale))
            used |= {name, partner, stem + ALPHA}
        elif leaf in BIASES or leaf == DIFFERENCE:
            target = _target((stem, layer), "weight" if leaf == DIFFERENCE else "bias", checkpoint)
            if target is not None and checkpoint[target].shape == tuple(tensor.shape):
                # PEFT scales the bias of `up` with all that the pair adds.
                rank = next((tensors[stem + down].shape[0] for down in DOWN if stem + down in tensors), None)
                strength = _strength(layer, rank, tensors.get(stem + ALPHA), adapter) if rank else 1.0
                scale = request.scale * (strength if leaf == ".lora_B.bias" else 1.0)
                added.setdefault(target, []).append(Update(tensor, scale))
                used.add(name)
    return added, [name for name in tensors if name not in used]


def _split(name: str) -> tuple[str, str]:
    """The layer's name, and the suffix of its tensor."""
    leaf = next((leaf for leaf in (*DOWN, *UP, ALPHA, *BIASES, DIFFERENCE) if name.endswith(leaf)), "")
    return name.removesuffix(leaf), leaf


def _bare(stem: str) -> str:
    """A layer's name without the prefix of its component."""
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    return stem


def _dotted(checkpoint: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Maps names of kohya's trainers to layers, without names that two layers would share."""
    stems = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint)
    written = Counter(stem.replace(".", "_") for stem in stems)
    return {
        prefix + name: stem for stem in stems if written[name := stem.replace(".", "_")] == 1 for prefix in UNDERSCORED
    }


def _target(stems: Iterable[str], leaf: str, checkpoint: Mapping[str, TensorSpec]) -> str | None:
    return next((name for stem in stems if (name := f"{stem}.{leaf}") in checkpoint), None)


def _fits(down: Tensor, up: Tensor, weight: TensorSpec) -> bool:
    """Whether up @ down has the shape of the weight; `down` may hold the kernel of a convolution."""
    if down.dim() < 2 or up.dim() < 2 or len(weight.shape) < 2:
        return False
    down, up = down.flatten(1), up.flatten(1)
    columns = weight.elements // weight.shape[0] if weight.shape[0] else 0
    return up.shape == (weight.shape[0], down.shape[0]) and down.shape[1] == columns


def _converted_by_diffusers(path: Path, tensors: Mapping[str, Tensor], model_class: str) -> dict[str, Tensor] | None:
    """The pairs under diffusers' names, or None if diffusers has no conversion for the class."""
    family = re.sub(r"Transformer\w*$|2DConditionModel$", "", model_class)
    mixin = getattr(importlib.import_module("diffusers.loaders.lora_pipeline"), f"{family}LoraLoaderMixin", None)
    if mixin is None:
        return None
    try:
        converted = mixin.lora_state_dict(dict(tensors))
    # Conversions raise all kinds of errors on files that they were not written for.
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: found names that match no weight of {model_class}, and diffusers cannot convert them "
            f"({type(error).__name__}: {reason}); expected a LoRA of this model"
        ) from None
    pairs = converted[0] if isinstance(converted, tuple) else converted
    return {name: tensor.contiguous() for name, tensor in pairs.items()}


def _check_complete(path: Path, tensors: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> None:
    """Refuses a conversion that dropped pairs: it may split pairs but never joins two."""
    for kind, leaves in (("pairs", DOWN), ("biases", BIASES), ("differences of whole weights", (DIFFERENCE,))):
        before, after = (sum(name.endswith(leaves) for name in names) for names in (tensors, converted))
        if after < before:
            raise CheckpointError(
                f"{path}: found {before} {kind}, of which diffusers' conversion keeps {after}, expected all; convert "
                "the file with the tool that trained it"
            )


def check_requests(requests: Sequence[LoraRequest], components: Collection[str]) -> dict[str, list[LoraRequest]]:
    """Assigns LoRA files to components: component name → its files.

    Raises:
        RecipeError: a file names no component although there are several, or one that is not converted.
    """
    sorted_out: dict[str, list[LoraRequest]] = {}
    for request in requests:
        name = request.component
        if name is None and len(components) == 1:
            name = next(iter(components))
        if name is None:
            denoisers = [each for each in components if each in DENOISERS]
            if len(denoisers) != 1:
                raise RecipeError(
                    f"--lora {request.path}: found {', '.join(components)} to bake it into, expected a choice: "
                    f"--lora {next(iter(components))}={request.path}"
                )
            name = denoisers[0]
        if name not in components:
            raise RecipeError(
                f"--lora {name}={request.path}: found no component '{name}' that is converted, expected one of "
                f"{', '.join(components) or 'none'}"
            )
        sorted_out.setdefault(name, []).append(request)
    return sorted_out
