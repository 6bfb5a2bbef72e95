"""MXFP4: E2M1 in blocks of 32 along K with a power-of-two scale each; activations are quantized alike at run time.

Tensors:    NAME.weight        F8_E4M3 [out, in]            the *values* 0, ±0.5 ... ±6, unpacked, no scale applied
            NAME.weight_scale  U8 [out, ceil(in / 32)]      E8M0 byte
            NAME.mul_scale     F32 [in]                     optional; multiplies the activation, exact in bfloat16
Arithmetic: W ≈ E2M1 * 2^(byte - 127) * mul_scale[k]: the columns were divided by mul_scale before.
Consumers:  vLLM-Omni `mxfp4` on Ascend 950, which copies the values into a bfloat16 parameter and packs them itself:
            packed codes do not fit. `require_smooth_scale` demands mul_scale of every layer; a fused group shares one.
Limits:     none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1, grid_flaw, round_to_e2m1
from omni_convert.formats.arithmetic.e8m0 import encode_e8m0, is_msmodelslim
from omni_convert.formats.arithmetic.encoding import E8M0, Encoding
from omni_convert.formats.arithmetic.input_values import quantize_mxfp4_input
from omni_convert.formats.arithmetic.mx import (
    MX_BLOCK,
    dequantize_mx,
    join_blocks,
    scale_blocks_,
    split_blocks,
)
from omni_convert.formats.arithmetic.smoothing import Quantizers, search_mul_scale
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Calibration
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows
from omni_convert.formats.schemes.mxfp8 import MxFormat, has_mx_scales

__all__ = ["MXFP4", "E2m1Format", "Mxfp4"]

MXFP4 = Encoding(E2M1, E8M0, (1, MX_BLOCK))


@dataclass(frozen=True)
class E2m1Format(MxFormat):
    """E2M1 values in blocks of 32, whose layer may multiply its inputs by a `mul_scale`."""

    calibration = Calibration.MUL_SCALE
    element = E2M1

    def round_elements(self, values: Tensor) -> Tensor:
        return round_to_e2m1(values, is_msmodelslim(self.scale_rule or ""))

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        return grid_flaw(tensors) or super().flaw(tensors)


@dataclass(frozen=True)
class Mxfp4(E2m1Format):
    """MXFP4 with a single level of scales; without a rule, exponents are searched or `uos`.

    Attributes:
        smooth: store mul_scale, searched with the statistics of the inputs; ones without statistics
    """

    smooth: bool = False

    method = "mxfp4"
    config_fields = ("require_smooth_scale",)

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> Mxfp4 | None:
        is_ours = has_mx_scales(tensors) and "weight_dual_scale" not in tensors
        return cls(smooth="mul_scale" in tensors) if is_ours else None

    @property
    def encoding(self) -> Encoding:
        return replace(MXFP4, is_smoothed=self.smooth)

    def with_mul_scale(self) -> Mxfp4:
        return replace(self, smooth=True)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        layout = {
            "weight": TensorLayout(torch.float8_e4m3fn, (out_features, in_features)),
            "weight_scale": TensorLayout(torch.uint8, (out_features, -(-in_features // MX_BLOCK))),
        }
        if self.smooth:
            layout["mul_scale"] = TensorLayout(torch.float32, (in_features,), rows_per_entry=0)
        return layout

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> Tensor | None:
        """The group's mul_scale, float32 [in], or None if the layout has none."""
        if not self.smooth:
            return None
        if inputs is None:
            return torch.ones(weights[0].shape[1])
        return search_mul_scale(weights, inputs, Quantizers(self._round_trip, quantize_mxfp4_input))

    def constants(self, fitted: Tensor | None) -> dict[str, Tensor]:
        return {} if fitted is None else {"mul_scale": fitted}

    def quantize_rows(self, rows: Tensor, fitted: Tensor | None) -> dict[str, Tensor]:
        mul_scale = None if fitted is None else fitted.to(rows.device)
        return quantize_in_tiles(rows, lambda tile: self._quantize_tile(tile, mul_scale))

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = dequantize_mx(tensors["weight"], tensors["weight_scale"])
        return values * tensors["mul_scale"].float() if "mul_scale" in tensors else values

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return quantize_mxfp4_input(inputs)

    def _quantize_tile(self, tile: Tensor, mul_scale: Tensor | None) -> dict[str, Tensor]:
        blocks = split_blocks(tile if mul_scale is None else tile.float() / mul_scale, MX_BLOCK)
        rule = self.scale_rule or ("mse" if self.search else "uos")
        exponent = scale_blocks_(blocks, E2M1, rule, tile.dtype)
        weight = join_blocks(round_to_e2m1(blocks, is_msmodelslim(rule)), tile.shape[1]).to(torch.float8_e4m3fn)
        return {"weight": weight, "weight_scale": encode_e8m0(exponent)}

    def _round_trip(self, rows: Tensor) -> Tensor:
        return self.dequantize(quantize_in_tiles(rows, lambda tile: self._quantize_tile(tile, None)))
