"""W4A16: 4-bit integers in groups of columns with one scale each; activations stay as they are.

Tensors:    NAME.weight             U8  [out, in]           codes 0 to 15, one a byte
            NAME.weight_scale       F32 [out, in / group]   numbers that float16 holds
            NAME.weight_zero_point  F32 [out, in / group]   8 everywhere
Arithmetic: W ≈ (code - 8) * weight_scale
Consumers:  as AutoRound and GPTQ pack it (`formats/dialects/auto_round.py`): vLLM, vLLM-Omni (CUDA, XPU), diffusers
            with auto-round, transformers; on CUDA by Marlin's kernels, for groups of 32, 64 or 128 columns
Limits:     in % group == 0, out % 8 == 0
Scales:     the one of a few candidates around amax / 7.5 with the least squared error; some clip the largest numbers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.search import best_attempt
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.format import CodedFormat
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import TensorLayout

__all__ = ["DEFAULT_GROUP", "PACKED_ROWS", "ZERO_POINT", "Int4"]

#: Columns that share a scale by default.
DEFAULT_GROUP = 128
#: Rows whose zero points share a word.
PACKED_ROWS = 8
#: The only one that is written.
ZERO_POINT = 8
LOWEST, HIGHEST = -8, 7
# Without search, the largest magnitude is the largest code of both signs.
PLAIN_DIVISOR = 7.0
DIVISORS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.75, 10.5)
# The smallest normal float16: below it scales would lose digits.
SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Int4(CodedFormat):
    """W4A16; the module describes it.

    Attributes:
        group: columns that share a scale
        search: choose scales by error
    """

    group: int = DEFAULT_GROUP
    search: bool = True

    method = "w4a16"
    is_weight_only = True
    activation_schemes = ("none",)
    options = ("group_size",)
    config_fields = ("group_size",)

    @classmethod
    def build(cls, options: FormatOptions) -> Int4:
        return cls(options.group_size or DEFAULT_GROUP, options.search)

    @property
    def encoding(self) -> Encoding:
        return Encoding(IntegerType(4, is_signed=False), block=(1, self.group), has_zero_point=True)

    @property
    def activation_scheme(self) -> str:
        return "none"

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if in_features % self.group:
            return (
                f"w4a16 needs in_features in groups of {self.group}, found {in_features}; a smaller group size may fit"
            )
        if out_features % PACKED_ROWS:
            return f"w4a16 needs out_features % {PACKED_ROWS} == 0, found {out_features}"
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        scales = TensorLayout(torch.float32, (out_features, in_features // self.group))
        return {
            "weight": TensorLayout(torch.uint8, (out_features, in_features)),
            "weight_scale": scales,
            "weight_zero_point": scales,
        }

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        return quantize_in_tiles(rows, self._quantize_tile)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return (tensors["weight"].float() - ZERO_POINT) * self.element_scale(tensors)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight_scale"].repeat_interleave(self.group, dim=1)

    def round_elements(self, values: Tensor) -> Tensor:
        return values.round().clamp_(LOWEST, HIGHEST)

    def encode_elements(self, elements: Tensor) -> Tensor:
        return (elements + ZERO_POINT).to(torch.uint8)

    def _quantize_tile(self, tile: Tensor) -> dict[str, Tensor]:
        values = tile.float().reshape(len(tile), -1, self.group)  # [rows, groups, group]
        amax = values.abs().amax(dim=2, keepdim=True)
        divisors = DIVISORS if self.search else (PLAIN_DIVISOR,)
        _, scale = best_attempt(self._attempt(values, amax / divisor) for divisor in divisors)
        codes = self.encode_elements(self.round_elements(values / scale)).flatten(1)
        scale = scale.squeeze(2)
        return {"weight": codes, "weight_scale": scale, "weight_zero_point": torch.full_like(scale, ZERO_POINT)}

    def _attempt(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The squared error of each group with a scale that float16 holds, and that scale; both [rows, groups, 1]."""
        scale = scale.half().float().clamp_(min=SMALLEST_SCALE)
        return (self.round_elements(values / scale) * scale - values).square().sum(dim=2, keepdim=True), scale
