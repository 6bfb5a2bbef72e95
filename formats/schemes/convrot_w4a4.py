"""ConvRot W4A4: 4-bit integers of a rotated weight, one scale per output row; inputs likewise, per token at run time.

Tensors:    NAME.weight        U8  [out, in / 2]   two codes a byte, even k in the low nibble, two's complement
            NAME.weight_scale  F32 [out, 1]
Arithmetic: W' ≈ code * weight_scale, where W' is the weight rotated in groups of 256, 64 or 16 columns
            (`arithmetic/rotation.py`); codes lie in -7..7
Consumers:  ComfyUI with comfy-kitchen (SM 7.5). Without search, codes and scales are comfy-kitchen's.
Limits:     in % 64 == 0
Error:      about 11 % of a weight, and more of the inputs: for few layers only
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import pack_nibbles, unpack_nibbles
from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import PER_ROW, Encoding
from omni_convert.formats.arithmetic.rotation import rotate, rotate_inputs
from omni_convert.formats.arithmetic.search import best_attempt
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.rotated import RotatedFormat

__all__ = ["CONVROT_W4A4", "ConvrotW4A4"]

CONVROT_W4A4 = Encoding(IntegerType(4), block=PER_ROW)
LARGEST_CODE = 7
SMALLEST_AMAX = 1e-10
# Scales to try, in units of the largest magnitude over 7: the smaller ones clip a few numbers.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True)
class ConvrotW4A4(RotatedFormat):
    """ConvRot W4A4; the module describes it.

    Attributes:
        search: choose scales by error
    """

    search: bool = True

    method = "convrot_w4a4"
    elements_per_entry = 2
    encoding_inside = CONVROT_W4A4
    column_multiple = 64

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout(torch.uint8, (out_features, in_features // 2)),
            "weight_scale": TensorLayout(torch.float32, (out_features, 1)),
        }

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        return quantize_in_tiles(rows, self._quantize_tile)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = (unpack_nibbles(tensors["weight"]) ^ 8).to(torch.float32) - 8
        return rotate(codes * tensors["weight_scale"].float(), self.group)

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        rotated = rotate_inputs(inputs, self.group)
        scale = _plain_scale(rotated)
        return rotate_inputs(_round(rotated, scale).mul_(scale), self.group)

    def _quantize_tile(self, tile: Tensor) -> dict[str, Tensor]:
        values = rotate(tile, self.group)
        scale = _searched_scale(values) if self.search else _plain_scale(values)
        codes = _round(values, scale).to(torch.int8).view(torch.uint8).bitwise_and_(15)
        return {"weight": pack_nibbles(codes), "weight_scale": scale}


def _searched_scale(values: Tensor) -> Tensor:
    """The scale of each row with the smallest error, float32 [rows, 1]."""
    plain = _plain_scale(values)
    return best_attempt(_attempt(values, plain * factor) for factor in FACTORS)[1]


def _attempt(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of each row with a scale, and the scale; both float32 [rows, 1]."""
    return _round(values, scale).mul_(scale).sub_(values).square_().sum(dim=1, keepdim=True), scale


def _plain_scale(values: Tensor) -> Tensor:
    """The scale with which the largest magnitude of a row is the largest code, float32 [rows, 1]."""
    return values.abs().amax(dim=1, keepdim=True).clamp_(min=SMALLEST_AMAX) / LARGEST_CODE


def _round(values: Tensor, scale: Tensor) -> Tensor:
    """Codes as float32."""
    return (values / scale).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
