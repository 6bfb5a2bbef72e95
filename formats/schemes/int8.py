"""INT8: 8-bit integers, symmetric, one scale per output row; activations are quantized per token at run time.

Tensors:    NAME.weight        I8  [out, in]
            NAME.weight_scale  F32 [out, 1]     amax of the row / 127
Arithmetic: W ≈ code * weight_scale; codes are rounded half to even and lie in -127..127.
Rotated:    ConvRot (`--rotate`) has the same tensors of W', the weight rotated in groups of 256, 64 or 16 columns
            (`arithmetic/rotation.py`), by comfy-kitchen's arithmetic. Inputs are rotated at run time.
Consumers:  vLLM-Omni `int8` on CUDA (SM80 to SM90) and Ascend. Its CUDA path (0.30.0) reads the scales of a fused
            linear as one per member, taking rows 0, 1, 2 of the column: with one scale for the whole group
            (`shared_in_group`, a constant column) both readings agree; with true per-row scales fused linears are
            wrong there and right on Ascend. Rotated: ComfyUI (SM 7.5), SGLang, stable-diffusion.cpp.
Limits:     Ascend runs out_features <= 65535.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import PER_ROW, Encoding
from omni_convert.formats.arithmetic.input_codes import INT8_MAX, int8_per_token
from omni_convert.formats.arithmetic.rotation import (
    SMALLEST_GROUP,
    rotate,
    rotate_inputs,
)
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.format import CodedFormat, QuantizingFormat
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows, weight_amax
from omni_convert.formats.schemes.rotated import RotatedFormat

__all__ = ["INT8", "Int8", "RotatedInt8"]

INT8 = Encoding(IntegerType(8), block=PER_ROW)
# 127 over it is still a normal float32 number; rows below are all but zero.
SMALLEST_AMAX = 2.0**-119
ASCEND_MAX_ROWS = 65535
# The least scale of a rotated row in comfy-kitchen.
SMALLEST_ROTATED_SCALE = 1e-30


@dataclass(frozen=True)
class Int8(CodedFormat):
    """INT8 per output row, or with one scale for a whole fused group, stored as a constant column."""

    shared_in_group: bool = False

    method = "int8"
    options = ("int8_fused_scales", "rotate")

    @classmethod
    def build(cls, options: FormatOptions) -> QuantizingFormat:
        return RotatedInt8() if options.rotate else cls(options.shared_in_group)

    @property
    def encoding(self) -> Encoding:
        return INT8

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if out_features > ASCEND_MAX_ROWS:
            return f"int8 needs out_features <= {ASCEND_MAX_ROWS} on Ascend, found {out_features}"
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout(torch.int8, (out_features, in_features)),
            "weight_scale": TensorLayout(torch.float32, (out_features, 1)),
        }

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> float | None:
        """The largest magnitude of the group, if it shares one scale."""
        return weight_amax(weights) if self.shared_in_group else None

    def quantize_rows(self, rows: Tensor, fitted: float | None) -> dict[str, Tensor]:
        return quantize_in_tiles(rows, lambda tile: self._quantize_tile(tile, fitted))

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"].float()

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scale = int8_per_token(inputs)
        return codes.float() * scale

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight_scale"].float()

    def round_elements(self, values: Tensor) -> Tensor:
        return values.round().clamp_(-INT8_MAX, INT8_MAX)

    def encode_elements(self, elements: Tensor) -> Tensor:
        return elements.to(torch.int8)

    def _quantize_tile(self, tile: Tensor, group_amax: float | None) -> dict[str, Tensor]:
        values = tile.to(torch.float32, copy=True)
        if group_amax is None:
            amax = values.abs().amax(dim=1, keepdim=True)
        else:
            amax = torch.full((len(values), 1), group_amax, device=values.device)
        amax = torch.where(amax == 0, INT8_MAX, amax.clamp_(min=SMALLEST_AMAX))
        codes = values.mul_(INT8_MAX / amax).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        scale = amax / INT8_MAX
        return {"weight": codes, "weight_scale": scale}


@dataclass(frozen=True)
class RotatedInt8(RotatedFormat):
    """INT8 per output row of a weight whose rows were rotated (ConvRot)."""

    method = Int8.method
    options = Int8.options
    encoding_inside = INT8

    @property
    def label(self) -> str:
        return f"{self.method}, rotated by {self.group}"

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if in_features % max(self.group, SMALLEST_GROUP):
            return f"rotated int8 needs in_features % {SMALLEST_GROUP} == 0, found {in_features}"
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return Int8().layout(out_features, in_features)

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        return quantize_in_tiles(rows, self._quantize_tile)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return rotate(Int8().dequantize(tensors), self.group)

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return rotate_inputs(Int8().round_inputs(rotate_inputs(inputs, self.group), tensors), self.group)

    def _quantize_tile(self, tile: Tensor) -> dict[str, Tensor]:
        values = rotate(tile, self.group)
        scale = (values.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp_(min=SMALLEST_ROTATED_SCALE)
        return {"weight": values.div_(scale).round_().clamp_(-128, INT8_MAX).to(torch.int8), "weight_scale": scale}
