"""How AutoRound spells a component; vLLM, vLLM-Omni and diffusers read it.

Integers: GPTQ's packing. NAME.qweight I32 [in * bits / 32, out]; NAME.scales F16 [in / group, out];
          NAME.qzeros I32 [in / group, out * bits / 32], zero points less 1 with "auto_gptq", as they are without
MX:       NAME.weight_packed U8 [out, in / 2], even element in the low nibble; or NAME.weight F8_E4M3;
          NAME.weight_scale U8 [out, in / 32]. NVFP4 as compressed-tensors has it.
Block:    {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq", ...}
Limits:   only read; AWQ's packing, reordered columns (g_idx), and bits other than 2, 4 and 8 are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from omni_convert.formats.codec import PackedColumns, Reciprocal, Transposed
from omni_convert.formats.dialect import Dialect, Found, Spelling, StoredLayer
from omni_convert.formats.dialects.bare import signed_layers
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.read_formats import Scaled

__all__ = ["AUTO_ROUND"]

METHODS = ("auto-round", "intel/auto-round", "gptq")
PACKED_NAMES = {
    "weight": "weight_packed",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}
INTEGER_NAMES = {"weight": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}
READABLE_BITS = (2, 4, 8)


class AutoRound(Dialect):
    """See the module."""

    name = "auto-round"

    def recognises(self, found: Found) -> bool:
        return found.quant_method.replace("_", "-") in METHODS

    def stored_layers(self, found: Found) -> Iterator[StoredLayer]:
        yield from (_integers(found, stem) for stem in found.stems("qweight"))
        yield from signed_layers(found, PACKED_NAMES, {"weight_scale_2": Reciprocal(), "input_scale": Reciprocal()})
        yield from signed_layers(found)


def _integers(found: Found, stem: str) -> StoredLayer:
    where = f"{found.checkpoint.path}: layer '{stem}'"
    packing = str(found.block.get("packing_format", "auto_round:auto_gptq"))
    bits = found.block.get("bits", 4)
    if "awq" in packing or found.get(stem, "g_idx") is not None:
        raise CheckpointError(
            f"{where}: found AWQ's packing or reordered columns (g_idx), expected GPTQ's without them"
        )
    if bits not in READABLE_BITS:
        raise CheckpointError(f"{where}: found bits {bits!r:.20} in the config block, expected 2, 4 or 8")
    words, scales = found.checkpoint[f"{stem}.qweight"], found.get(stem, "scales")
    if len(words.shape) != 2 or scales is None or len(scales.shape) != 2 or not scales.shape[0]:
        raise CheckpointError(f"{where}: found qweight without scales [in / group, out], expected both")
    rows, columns = words.shape[1], words.shape[0] * (32 // bits)
    group = None if scales.shape[0] == 1 else -(-columns // scales.shape[0])
    offset = 1 if "gptq" in packing or found.quant_method == "gptq" else 0
    codecs = {
        "weight": PackedColumns(bits),
        "weight_scale": Transposed(),
        "weight_zero_point": PackedColumns(bits, along_rows=True, offset=offset),
    }
    fmt = Scaled(f"int{bits}", torch.uint8, group, has_zero_point=True)
    return StoredLayer(stem, fmt, (rows, columns), Spelling(INTEGER_NAMES, codecs))


AUTO_ROUND = AutoRound()
