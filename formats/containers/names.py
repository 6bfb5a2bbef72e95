"""The last parts of the names of tensors: of weights, of codes, and of what stands beside codes."""

from __future__ import annotations

import torch

__all__ = ["CANONICAL_COMPANIONS", "CODES", "COMPANIONS", "LOW_BIT", "WEIGHT", "layer_of"]

#: What a layer's name is followed by in that of its weight.
WEIGHT = ".weight"
#: Beside a quantized `weight` in the formats' own layouts.
CANONICAL_COMPANIONS = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_dual_scale",
    "mul_scale",
    "input_scale",
)
#: Beside codes in any tool's layout, where alone they make sense.
COMPANIONS = (
    *CANONICAL_COMPANIONS,
    "weight_global_scale",
    "weight_s_rel",
    "weight_s_channel",
    "weight_codebook",
    "weight_zero_point",
    "weight_offset",
    "weight_shape",
    "pre_quant_scale",
    "input_global_scale",
    "activation_scale",
    "scale_weight",
    "scale_input",
    "scales",
    "qzeros",
    "g_idx",
    "comfy_quant",
)
#: Codes in any tool's layout, and the dtypes that they are stored in.
CODES = ("weight", "weight_packed", "qweight")
LOW_BIT = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32)


def layer_of(name: str) -> str:
    """The layer of a tensor that is a weight, or whose name begins with that of a weight; else the name itself."""
    return name.partition(WEIGHT)[0]
