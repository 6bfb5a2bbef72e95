"""Reads LoRA files, and finds the weight that each of their tensors belongs to; nothing is left out in silence.

file ─► pairs named as PEFT does ─► matched by name and shape with the component's tensors ─► what is added to which
         │ as they are, or through diffusers' own conversion for the family (kohya, ComfyUI, original names)
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.recipe import LoraRequest
from omni_convert.convert.source.file_hash import file_sha256
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError, RecipeError, listed
from omni_convert.formats.views.lora import LowRank, Update, baked_view

__all__ = ["Lora", "bake", "check_requests", "read_lora"]

# A pair is named by the layer that it belongs to and one of each of these.
DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
ALPHA = ".alpha"
BIASES = (".lora_B.bias", ".diff_b")
DIFFERENCE = ".diff"
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.")
# kohya's trainers write these and the layer's name with underscores for dots.
UNDERSCORED = ("lora_unet_", "lora_transformer_")
# PEFT's description of an adapter: beside the file, or in its header as diffusers writes it.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"
# In a folder, what diffusers' save_lora_weights and PEFT's save_pretrained write.
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Lora:
    """A file, matched with a component.

    Attributes:
        added: name of a tensor of the component → what is added to it
        left_out: names in the file that match nothing, which only --force lets pass
        sha256: of the file
    """

    request: LoraRequest
    added: dict[str, list[LowRank | Update]]
    left_out: tuple[str, ...]
    sha256: str

    @property
    def description(self) -> dict[str, Any]:
        """For the manifest: no paths."""
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
    """The checkpoint with all the files baked in, in their order, and what they are.

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
        request: of a file, or of a folder with one
        checkpoint: the component's tensors, as diffusers names them
        model_class: the component's class in diffusers, whose conversion of names may be needed
        force: leave out what matches nothing

    Raises:
        CheckpointError: the file is damaged, is no LoRA, or tensors of it match nothing.
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
    """The file itself; of a folder, the one LoRA in it."""
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
    """Whether it adds nothing: trainers write zeros for layers that they leave alone."""
    return name.endswith((DIFFERENCE, ".diff_b")) and not bool(tensor.any())


def _refuse_other_kinds(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        if not name.endswith((*DOWN, *UP, ALPHA, *BIASES, DIFFERENCE)):
            raise CheckpointError(
                f"{path}: found tensor '{name}', expected pairs of low rank (lora_A and lora_B, or lora_down and "
                "lora_up): DoRA, LoKr, LoHa and others are not baked; merge them with the tool that trained them"
            )


def _adapter_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's description, without the component's name before its keys; {} if there is none."""
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
    """Alpha over rank, as PEFT computes it; 1 where nothing says alpha."""
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
    """What is added to which tensor, and the names that found none."""
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
    """Layer, and which of its tensors."""
    leaf = next((leaf for leaf in (*DOWN, *UP, ALPHA, *BIASES, DIFFERENCE) if name.endswith(leaf)), "")
    return name.removesuffix(leaf), leaf


def _bare(stem: str) -> str:
    """A layer's name without what stands for the component."""
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    return stem


def _dotted(checkpoint: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Layers by their names as kohya's trainers write them, without those that two layers would have."""
    stems = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint)
    written = Counter(stem.replace(".", "_") for stem in stems)
    return {
        prefix + name: stem for stem in stems if written[name := stem.replace(".", "_")] == 1 for prefix in UNDERSCORED
    }


def _target(stems: Iterable[str], leaf: str, checkpoint: Mapping[str, TensorSpec]) -> str | None:
    return next((name for stem in stems if (name := f"{stem}.{leaf}") in checkpoint), None)


def _fits(down: Tensor, up: Tensor, weight: TensorSpec) -> bool:
    """Whether up @ down has the shape of the weight; of convolutions with a kernel in `down` alone, too."""
    if down.dim() < 2 or up.dim() < 2 or len(weight.shape) < 2:
        return False
    down, up = down.flatten(1), up.flatten(1)
    columns = weight.elements // weight.shape[0] if weight.shape[0] else 0
    return up.shape == (weight.shape[0], down.shape[0]) and down.shape[1] == columns


def _converted_by_diffusers(path: Path, tensors: Mapping[str, Tensor], model_class: str) -> dict[str, Tensor] | None:
    """The pairs under diffusers' names, if it has a conversion for this model."""
    family = re.sub(r"Transformer\w*$|2DConditionModel$", "", model_class)
    mixin = getattr(importlib.import_module("diffusers.loaders.lora_pipeline"), f"{family}LoraLoaderMixin", None)
    if mixin is None:
        return None
    try:
        converted = mixin.lora_state_dict(dict(tensors))
    # Conversions fail in whatever way a file that they do not know makes them.
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: found names that match no weight of {model_class}, and diffusers cannot convert them "
            f"({type(error).__name__}: {reason}); expected a LoRA of this model"
        ) from None
    pairs = converted[0] if isinstance(converted, tuple) else converted
    return {name: tensor.contiguous() for name, tensor in pairs.items()}


def _check_complete(path: Path, tensors: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> None:
    """Conversion splits pairs, and never joins two: fewer than before means that some were dropped."""
    for kind, leaves in (("pairs", DOWN), ("biases", BIASES), ("differences of whole weights", (DIFFERENCE,))):
        before, after = (sum(name.endswith(leaves) for name in names) for names in (tensors, converted))
        if after < before:
            raise CheckpointError(
                f"{path}: found {before} {kind}, of which diffusers' conversion keeps {after}, expected all; convert "
                "the file with the tool that trained it"
            )


def check_requests(requests: tuple[LoraRequest, ...], components: Mapping[str, str]) -> dict[str, list[LoraRequest]]:
    """Component name → the files to bake into it.

    Raises:
        RecipeError: a file names no component where there are several, or one that is not converted.
    """
    sorted_out: dict[str, list[LoraRequest]] = {}
    for request in requests:
        name = request.component
        if name is None and len(components) == 1:
            name = next(iter(components))
        if name is None:
            denoisers = [each for each in components if each.startswith(("transformer", "unet"))]
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
