"""MXFP4 dual-scale: E2M1 with a power-of-two scale per 32 along K and a float32 scale per 512 above it.

Tensors:    NAME.weight             F8_E4M3 [out, in]             the *values* 0, ±0.5 ... ±6, unpacked, unscaled
            NAME.weight_scale       U8 [out, in / 32]             fine scale, E8M0 byte
            NAME.weight_dual_scale  F32 [out, ceil(in / 512), 1]  coarse scale
            NAME.mul_scale          F32 [in]                      multiplies the activation, exact in bfloat16
Arithmetic: W ≈ E2M1 * 2^(byte - 127) * weight_dual_scale[k div 512] * mul_scale[k]
Consumers:  vLLM-Omni `mxfp4_dualscale` on Ascend 950; all four tensors are required (mul_scale is ones if unused), and
            a fused group shares one mul_scale.
Limits:     in % 64 == 0: the loader pairs the fine scales. A short last group of 512 is stored as the loader allocates
            it; nobody has run one on hardware.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.dualscale_search import search_coarse_scale
from omni_convert.formats.arithmetic.e2m1 import E2M1, round_to_e2m1
from omni_convert.formats.arithmetic.e8m0 import encode_e8m0, is_msmodelslim
from omni_convert.formats.arithmetic.encoding import E8M0, Encoding
from omni_convert.formats.arithmetic.input_values import quantize_mxfp4_dualscale_input
from omni_convert.formats.arithmetic.mx import (
    COARSE_BLOCK,
    MX_BLOCK,
    block_amax,
    dequantize_mx,
    element_scale_mx,
    join_blocks,
    scale_blocks_,
    split_blocks,
)
from omni_convert.formats.arithmetic.smoothing import Quantizers, search_mul_scale
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows
from omni_convert.formats.schemes.mxfp4 import E2m1Format
from omni_convert.formats.schemes.mxfp8 import has_mx_scales

__all__ = ["Mxfp4DualScale"]


@dataclass(frozen=True)
class Mxfp4DualScale(E2m1Format):
    """MXFP4 with two levels of scales.

    A rule chooses the fine exponents, with the coarse scale at amax / 6. Without one, coarse scale and exponents are
    searched together, or the rule is `even`.

    Attributes:
        smooth: search mul_scale when there are statistics of the inputs; else it is ones
    """

    smooth: bool = True

    method = "mxfp4_dualscale"

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> Mxfp4DualScale | None:
        is_ours = has_mx_scales(tensors) and "weight_dual_scale" in tensors
        return cls(smooth="mul_scale" in tensors) if is_ours else None

    @classmethod
    def notes(cls, widths: Collection[int]) -> list[str]:
        short = [str(width) for width in sorted(widths) if width % COARSE_BLOCK]
        if not short:
            return []
        return [
            f"in_features {', '.join(short)}: no multiple of {COARSE_BLOCK}, so the last coarse scale of a row covers "
            "fewer; stored as vLLM-Omni allocates it, not run on hardware yet"
        ]

    @property
    def encoding(self) -> Encoding:
        return Encoding(E2M1, E8M0, (1, MX_BLOCK), outer_block=(1, COARSE_BLOCK), is_smoothed=True)

    def with_mul_scale(self) -> Mxfp4DualScale:
        return self

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if in_features % (2 * MX_BLOCK):
            return f"mxfp4_dualscale needs in_features % {2 * MX_BLOCK} == 0, found {in_features}"
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        groups = -(-in_features // COARSE_BLOCK)
        return {
            "weight": TensorLayout(torch.float8_e4m3fn, (out_features, in_features)),
            "weight_scale": TensorLayout(torch.uint8, (out_features, in_features // MX_BLOCK)),
            "weight_dual_scale": TensorLayout(torch.float32, (out_features, groups, 1)),
            "mul_scale": TensorLayout(torch.float32, (in_features,), rows_per_entry=0),
        }

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> Tensor:
        """The group's mul_scale, float32 [in]."""
        if inputs is None or not self.smooth:
            return torch.ones(weights[0].shape[1])
        return search_mul_scale(weights, inputs, Quantizers(self._round_trip, quantize_mxfp4_dualscale_input))

    def constants(self, fitted: Tensor) -> dict[str, Tensor]:
        return {"mul_scale": fitted}

    def quantize_rows(self, rows: Tensor, fitted: Tensor) -> dict[str, Tensor]:
        mul_scale = fitted.to(rows.device)
        is_one = bool((mul_scale == 1).all())
        return quantize_in_tiles(rows, lambda tile: self._quantize_tile(tile if is_one else tile.float() / mul_scale))

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"]
        columns = weight.shape[1]
        fine = dequantize_mx(weight, tensors["weight_scale"])
        coarse = split_blocks(fine, COARSE_BLOCK).mul_(tensors["weight_dual_scale"].float())
        return join_blocks(coarse, columns) * tensors["mul_scale"].float()

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return quantize_mxfp4_dualscale_input(inputs)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        columns = tensors["weight"].shape[1]
        fine = element_scale_mx(tensors["weight_scale"], columns)
        coarse = tensors["weight_dual_scale"].float().squeeze(-1).repeat_interleave(COARSE_BLOCK, dim=1)
        return fine * coarse[:, :columns]

    def _quantize_tile(self, tile: Tensor) -> dict[str, Tensor]:
        groups = split_blocks(tile, COARSE_BLOCK)  # [rows, groups, 512]
        coarse = block_amax(groups) / E2M1.largest
        coarse = torch.where(coarse == 0, 1.0, coarse)
        if self.scale_rule is None and self.search:
            coarse *= search_coarse_scale(groups / coarse[..., None])
        blocks = groups.div_(coarse[..., None]).view(len(tile), -1, MX_BLOCK)
        rule = self.scale_rule or ("mse" if self.search else "even")
        exponent = scale_blocks_(blocks, E2M1, rule)
        columns = tile.shape[1]
        return {
            "weight": join_blocks(round_to_e2m1(blocks, is_msmodelslim(rule)), columns).to(torch.float8_e4m3fn),
            "weight_scale": encode_e8m0(exponent[:, : columns // MX_BLOCK]).contiguous(),
            "weight_dual_scale": coarse[..., None],
        }

    def _round_trip(self, rows: Tensor) -> Tensor:
        return self.dequantize(quantize_in_tiles(rows, self._quantize_tile) | {"mul_scale": torch.ones(())})
