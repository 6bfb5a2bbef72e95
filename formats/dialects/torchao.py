"""How torchao stores its tensors in safetensors, through diffusers, transformers or by itself; only read.

Tensors:  NAME._weight_qdata          E4M3 or I8 [out, in]
          NAME._weight_scale          F32 or the model's dtype; for all, a row, a group or a block; it multiplies
          NAME._weight_zero_point     I8, of integers; all zero where codes are symmetric
          NAME._weight_act_pre_scale  [in], of integers with smoothed inputs, which it multiplies
          Int4Tensor                  qdata I8 [out, in / 2], the even element in the low nibble, two's complement;
                                      scale and zero_point [in / group, out]: W = code * scale + zero_point
Header:   NAME.weight → {"_type": "Float8Tensor", "_data": {...}, "_tensor_data_names": ["qdata", "scale"]} as JSON;
          tensor_names → the list of names
Limits:   Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor and Int4Tensor are read. Other Int4 lies in the order of
          kernels, MX and NVFP4 have swizzled scales.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import Dialect, Found, LayerError, StoredLayer, attempt
from omni_convert.formats.dialects.codec import Codec, Plain, Transposed
from omni_convert.formats.dialects.detection import Signature, read_signature, stored_layer, unknown_format
from omni_convert.formats.dialects.packed_words import SignedNibbles
from omni_convert.formats.dialects.verdict import DIFFUSERS, REQUANTIZE, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.schemes.foreign import Scaled, Smoothed

__all__ = ["TORCHAO"]

QUANT_METHOD = "torchao"
INT4 = "Int4Tensor"
READ = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", INT4)
PLAIN_TENSOR = "Tensor"
PARTS = "_tensor_data_names"
# Role to torchao's name of the part.
ROLES = {
    "weight": "qdata",
    "weight_scale": "scale",
    "weight_zero_point": "zero_point",
    "mul_scale": "act_pre_scale",
}
# Parts by which inputs are quantized; the weight is the same without them.
OF_INPUTS = ("act_quant_scale", "act_quant_zero_point")


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
    listed = entry.get(PARTS)
    strange = [str(part) for part in listed or () if part not in (*ROLES.values(), *OF_INPUTS)]
    if not isinstance(listed, list) or strange:
        part = str(strange[0] if strange else listed)[:40]
        raise LayerError(found, stem, f"layer '{stem}': found part '{part}' in torchao's {kind}, expected known ones")
    missing = [role for role in ("weight", "weight_scale") if role not in parts]
    if missing:
        what = f"tensor '{module}._{leaf}_{ROLES[missing[0]]}' is missing, expected with torchao's {kind}"
        raise LayerError(found, stem, what, "missing-companion")
    signature = _int4(parts) if kind == INT4 else read_signature(parts)
    if signature is None:
        raise unknown_format(found, stem, parts)
    zeros = {"weight_zero_point": Plain(dtype=torch.int8)} if "weight_zero_point" in parts and kind != INT4 else {}
    of_inputs = (f"{module}._{leaf}_{part}" for part in OF_INPUTS)
    layer = stored_layer(stem, signature, parts, zeros)
    unused = tuple(each for each in of_inputs if each in found.checkpoint)
    return replace(layer, unused=unused, weight=None if name.endswith(WEIGHT) else name)


def _int4(parts: Mapping[str, TensorSpec]) -> Signature | None:
    """The format of an Int4Tensor; None if its parts do not fit each other, or hold a stack of matrices."""
    codes, scale, zero = parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    if len(codes.shape) != 2 or len(scale.shape) != 2 or zero is None or not scale.shape[0]:
        return None
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    fmt = Scaled("int4", torch.int8, -(-columns // scale.shape[0]), has_zero_point=True, adds_zero_point=True)
    codecs: dict[str, Codec] = {
        "weight": SignedNibbles(),
        "weight_scale": Transposed(),
        "weight_zero_point": Transposed(),
    }
    return Signature(Smoothed(fmt) if "mul_scale" in parts else fmt, (rows, columns), codecs)


TORCHAO = TorchAo()
