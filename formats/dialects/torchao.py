"""How torchao stores its tensors in safetensors, through diffusers, transformers or by itself; only read.

Tensors:  NAME._weight_qdata       E4M3 or I8 [out, in]
          NAME._weight_scale       F32 or the model's dtype: one number, a row's, a group's or a block's; it multiplies
          NAME._weight_zero_point  I8, of Int8Tensor; all zero where codes are symmetric
Header:   NAME.weight → {"_type": "Float8Tensor", "_data": {...}, "_tensor_data_names": ["qdata", "scale"]} as JSON;
          tensor_names → the list of names
Limits:   Float8Tensor and Int8Tensor are read. Int4 lies in the order of kernels, MX and NVFP4 have swizzled scales.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.dialects.base import Dialect, Found, LayerError, StoredLayer, attempt
from omni_convert.formats.dialects.codec import Plain
from omni_convert.formats.dialects.detection import read_signature, stored_layer, unknown_format
from omni_convert.formats.dialects.verdict import DIFFUSERS, REQUANTIZE, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.errors import CheckpointError

__all__ = ["TORCHAO"]

QUANT_METHOD = "torchao"
READ = ("Float8Tensor", "Int8Tensor")
PLAIN_TENSOR = "Tensor"
PARTS = "_tensor_data_names"
# Role to torchao's name of the part.
ROLES = {"weight": "qdata", "weight_scale": "scale", "weight_zero_point": "zero_point"}


class TorchAo(Dialect):
    """See the module."""

    name = "torchao"
    consumers = "diffusers, transformers"
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "reads torchao's .bin files only, and not for every model"),
        Verdict(DIFFUSERS, "loads", "with torchao installed; so does transformers"),
        REQUANTIZE,
        UNMARKED,
    )
    has_low_precision_scales = True

    def recognises(self, found: Found) -> bool:
        return found.quant_method == QUANT_METHOD or any(PARTS in text for text in found.metadata.values())

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        described = {name: entry for name, entry in _entries(found) if entry.get("_type") != PLAIN_TENSOR}
        if not described:
            raise CheckpointError(
                f"{found.checkpoint.path}: found torchao in the config block and no description of its tensors in the "
                "header, expected one; save it with save_pretrained of a torchao that writes safetensors"
            )
        return (attempt(_layer, found, name, entry) for name, entry in described.items())


def _entries(found: Found) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The descriptions of tensors in the header."""
    for name, text in found.metadata.items():
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, Mapping) and "_type" in entry:
            yield name, entry


def _layer(found: Found, name: str, entry: Mapping[str, Any]) -> StoredLayer:
    """A tensor from its description and its parts."""
    kind = entry["_type"]
    stem = name.removesuffix(WEIGHT)
    if kind not in READ:
        what = f"layer '{stem}': found torchao's {str(kind)[:40]}, expected {' or '.join(READ)}; others are not read"
        raise LayerError(found, stem, what)
    module, _, leaf = name.rpartition(".")
    parts = {
        role: spec
        for role, part in ROLES.items()
        if (spec := found.checkpoint.get(f"{module}._{leaf}_{part}")) is not None
    }
    missing = [role for role in ("weight", "weight_scale") if role not in parts]
    if missing:
        what = f"tensor '{module}._{leaf}_{ROLES[missing[0]]}' is missing, expected with torchao's {kind}"
        raise LayerError(found, stem, what, "missing-companion")
    signature = read_signature(parts)
    if signature is None:
        raise unknown_format(found, stem, parts)
    zeros = {"weight_zero_point": Plain(dtype=torch.int8)} if "weight_zero_point" in parts else {}
    used = {spec.name for spec in parts.values()}
    prefix = f"{module}._{leaf}_"
    others = tuple(each for each in found.checkpoint if each.startswith(prefix) and each not in used)
    layer = stored_layer(stem, signature, parts, zeros)
    return replace(layer, unused=others, weight=None if name.endswith(WEIGHT) else name)


TORCHAO = TorchAo()
