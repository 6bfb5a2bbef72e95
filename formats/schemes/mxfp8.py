"""MXFP8: E4M3 in blocks of 32 along K with a power-of-two scale each; activations are quantized alike at run time.

Tensors:    NAME.weight        F8_E4M3 [out, in]
            NAME.weight_scale  U8 [out, ceil(in / 32)]     E8M0 byte
Arithmetic: W ≈ E4M3(code) * 2^(byte - 127); a short last block is a block.
Consumers:  vLLM-Omni `mxfp8` on Ascend 950. AutoRound's MXFP8 has the same two tensors (in % 32 == 0 there).
Limits:     none; the runtime cannot shard row-parallel layers of this format over several devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e8m0 import encode_e8m0, is_msmodelslim
from omni_convert.formats.arithmetic.element import ElementType
from omni_convert.formats.arithmetic.encoding import E8M0, Encoding
from omni_convert.formats.arithmetic.float8 import E4M3, round_to_e4m3
from omni_convert.formats.arithmetic.input_values import quantize_mxfp8_input
from omni_convert.formats.arithmetic.mx import (
    MX_BLOCK,
    check_scale_rule,
    dequantize_mx,
    element_scale_mx,
    join_blocks,
    scale_blocks_,
    split_blocks,
)
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import CodedFormat
from omni_convert.formats.rows import TensorLayout

__all__ = ["MXFP8", "MxFormat", "Mxfp8", "has_mx_scales"]

MXFP8 = Encoding(E4M3, E8M0, (1, MX_BLOCK))


def has_mx_scales(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a layer has a weight in E4M3, or in E2M1 values stored as such, and a byte of E8M0 for each block."""
    scale = tensors.get("weight_scale")
    return tensors["weight"].dtype is torch.float8_e4m3fn and scale is not None and scale.dtype is torch.uint8


@dataclass(frozen=True)
class MxFormat(CodedFormat):
    """Elements that are stored as E4M3, with an E8M0 byte for each block of 32.

    Attributes:
        scale_rule: exponent rule of `arithmetic/e8m0.py`; None for the best one of the format. The rules of msModelSlim
            also round ties away from zero, as that tool does
        search: choose scales by the squared error, unless there is a rule

    Raises:
        RecipeError: the rule is not defined for the element.
    """

    scale_rule: str | None = None
    search: bool = True

    options = ("scale_rule",)
    element: ClassVar[ElementType]

    def __post_init__(self) -> None:
        check_scale_rule(self.scale_rule, self.element, self.method)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return element_scale_mx(tensors["weight_scale"], tensors["weight"].shape[1])

    def encode_elements(self, elements: Tensor) -> Tensor:
        return elements.to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Mxfp8(MxFormat):
    """MXFP8; without a rule, exponents are searched or `rceil`."""

    method = "mxfp8"
    element = E4M3

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> Mxfp8 | None:
        is_ours = has_mx_scales(tensors) and tensors.keys().isdisjoint(("mul_scale", "weight_dual_scale"))
        return cls() if is_ours else None

    @property
    def encoding(self) -> Encoding:
        return MXFP8

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout(torch.float8_e4m3fn, (out_features, in_features)),
            "weight_scale": TensorLayout(torch.uint8, (out_features, -(-in_features // MX_BLOCK))),
        }

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        return quantize_in_tiles(rows, self._quantize_tile)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return dequantize_mx(tensors["weight"], tensors["weight_scale"])

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return quantize_mxfp8_input(inputs)

    def round_elements(self, values: Tensor) -> Tensor:
        return round_to_e4m3(values, is_msmodelslim(self.scale_rule or "")).float()

    def _quantize_tile(self, tile: Tensor) -> dict[str, Tensor]:
        blocks = split_blocks(tile, MX_BLOCK)
        rule = self.scale_rule or ("mse" if self.search else "rceil")
        exponent = scale_blocks_(blocks, E4M3, rule, tile.dtype)
        weight = join_blocks(round_to_e4m3(blocks, is_msmodelslim(rule)), tile.shape[1])
        return {"weight": weight, "weight_scale": encode_e8m0(exponent)}
