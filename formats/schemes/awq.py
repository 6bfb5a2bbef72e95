"""AWQ W4A16: 4-bit integers in groups of 64 columns, each with a scale and a lowest number; activations stay.

Tensors:    NAME.weight             U8  [out, in]        codes 0 to 15, one a byte
            NAME.weight_scale       F32 [out, in / 64]   numbers that BF16 holds
            NAME.weight_zero_point  F32 [out, in / 64]   numbers that BF16 holds; about the smallest of the group
Arithmetic: W = code * weight_scale + weight_zero_point
Consumers:  Nunchaku and diffusers' `nunchaku_lite`, for the modulations of a model
Limits:     in % 64 == 0, out % 4 == 0
Scales:     those of a few spans around the group's own with the least squared error; some clip the ends
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.format import CodedFormat
from omni_convert.formats.rows import TensorLayout

__all__ = ["AWQ_GROUP", "AWQ_ROWS", "AwqInt4"]

#: Columns that share a scale, and rows whose codes lie together.
AWQ_GROUP, AWQ_ROWS = 64, 4
HIGHEST = 15
#: Parts of the span of a group that are tried.
SPANS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75)
SMALLEST_SPAN = 1e-10


@dataclass(frozen=True)
class AwqInt4(CodedFormat):
    """AWQ W4A16; the module describes it.

    Attributes:
        search: choose scales by error
    """

    search: bool = True

    method = "awq_w4a16"
    is_weight_only = True
    activation_schemes = ("none",)

    @property
    def encoding(self) -> Encoding:
        element = IntegerType(4, is_signed=False)
        return Encoding(element, block=(1, AWQ_GROUP), has_zero_point=True, is_symmetric=False)

    @property
    def activation_scheme(self) -> str:
        return "none"

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if out_features % AWQ_ROWS or in_features % AWQ_GROUP:
            found = f"{out_features} x {in_features}"
            return (
                f"{self.method} needs out_features % {AWQ_ROWS} == 0 and in_features % {AWQ_GROUP} == 0, found {found}"
            )
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        numbers = TensorLayout(torch.float32, (out_features, in_features // AWQ_GROUP))
        return {
            "weight": TensorLayout(torch.uint8, (out_features, in_features)),
            "weight_scale": numbers,
            "weight_zero_point": numbers,
        }

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        return quantize_in_tiles(rows, self._quantize_tile)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float().mul_(self.element_scale(tensors)).add_(_spread(tensors["weight_zero_point"]))

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return _spread(tensors["weight_scale"])

    def element_minimum(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return -_spread(tensors["weight_zero_point"])

    def round_elements(self, values: Tensor) -> Tensor:
        return values.round().clamp_(0, HIGHEST)

    def encode_elements(self, elements: Tensor) -> Tensor:
        return elements.to(torch.uint8)

    def _quantize_tile(self, tile: Tensor) -> dict[str, Tensor]:
        values = tile.float().reshape(len(tile), -1, AWQ_GROUP)  # [rows, groups, group]
        low, high = torch.aminmax(values, dim=2, keepdim=True)
        middle, span = (low + high) / 2, (high - low).clamp_(min=SMALLEST_SPAN)
        best = torch.full_like(span, torch.inf)
        scale, lowest = torch.empty_like(span), torch.empty_like(span)
        for part in SPANS if self.search else SPANS[:1]:
            step = (span * part / HIGHEST).bfloat16().float()
            start = (middle - step * HIGHEST / 2).bfloat16().float()
            found = self.round_elements((values - start) / step).mul_(step).add_(start)
            error = found.sub_(values).square_().sum(dim=2, keepdim=True)
            is_better = error < best
            scale, lowest = torch.where(is_better, step, scale), torch.where(is_better, start, lowest)
            best = torch.minimum(best, error)
        codes = self.encode_elements(self.round_elements((values - lowest) / scale)).flatten(1)
        return {"weight": codes, "weight_scale": scale.squeeze(2), "weight_zero_point": lowest.squeeze(2)}


def _spread(numbers: Tensor) -> Tensor:
    """A number for each column, float32 [rows, in]."""
    return numbers.float().repeat_interleave(AWQ_GROUP, dim=1)
