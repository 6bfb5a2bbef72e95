"""NVFP4: E2M1 in blocks of 16 along K with an E4M3 scale each and one float32 scale above, as ModelOpt stores it.

Tensors:    NAME.weight          U8 [out, in / 2]          two codes a byte, even k in the low nibble
            NAME.weight_scale    F8_E4M3 [out, in / 16]    linear (not swizzled)
            NAME.weight_scale_2  F32 []                    amax / (448 * 6), or larger
            NAME.input_scale     F32 []                    clip of the inputs / (448 * 6); only with static activations
Arithmetic: W ≈ E2M1 * weight_scale * weight_scale_2
Consumers:  vLLM-Omni and vLLM `modelopt`. Fused linears take the largest weight_scale_2 and input_scale of their
            members without requantizing, hence one of each for the group. Without input_scale the config must say
            `input_activations: null` (weight-only), else the runtime quantizes with an unset scale.
Limits:     in % 16 == 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1, decode_packed, encode_e2m1, pack_nibbles, round_to_e2m1
from omni_convert.formats.arithmetic.encoding import PER_TENSOR, Encoding
from omni_convert.formats.arithmetic.input_values import quantize_nvfp4_input
from omni_convert.formats.arithmetic.mx import block_amax, block_error, join_blocks, split_blocks
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK, NVFP4_LARGEST, nvfp4_block_scale
from omni_convert.formats.arithmetic.scalar_scale import SCALAR, scalars, static_scale
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Calibration, CodedFormat
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows, sample_rows, weight_amax

__all__ = ["NVFP4", "Nvfp4", "nvfp4_scales"]

NVFP4 = Encoding(E2M1, torch.float8_e4m3fn, (1, NVFP4_BLOCK), outer_block=PER_TENSOR)
# Below, the product of both scales would leave the normal float32 numbers.
SMALLEST_GLOBAL_SCALE = 2.0**-117

# Codes relative to that of amax / 6: from two steps of clipping to beyond amax at 4 (a scale 1.5 times as large, 4 to 5
# codes up), where the coarse top step of E2M1, from 4 to 6, stays unused.
CODE_OFFSETS = range(-2, 7)
# Above amax / 2688 the largest block, too, may take a larger scale, and all scales move within E4M3's binades.
GLOBAL_FACTORS = (1.0, 1.25, 1.5, 1.75)
SEARCH_ROWS = 64


@dataclass(frozen=True)
class Nvfp4(CodedFormat):
    """NVFP4 in ModelOpt's layout.

    Attributes:
        static: store input_scale (static activations); needs statistics of the inputs
        input_scale_rule: how input_scale is chosen, see `InputStatistics.clip`
        search: choose block scales and the global scale by the squared error
    """

    static: bool = False
    input_scale_rule: str = "max"
    search: bool = True

    method = "nvfp4"
    activation_schemes = ("static", "none")
    calibration = Calibration.INPUT_SCALE
    options = ("input_scale",)

    @classmethod
    def build(cls, options: FormatOptions) -> Nvfp4:
        return cls(options.static, options.input_scale, options.search)

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> Nvfp4 | None:
        is_ours = tensors["weight"].dtype is torch.uint8 and "weight_scale_2" in tensors
        return cls(static="input_scale" in tensors) if is_ours else None

    elements_per_entry = 2
    largest_input = NVFP4_LARGEST

    @property
    def encoding(self) -> Encoding:
        return NVFP4

    @property
    def activation_scheme(self) -> str:
        return "static" if self.static else "none"

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if in_features % NVFP4_BLOCK:
            return f"nvfp4 needs in_features % {NVFP4_BLOCK} == 0, found {in_features}"
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        layout = {
            "weight": TensorLayout(torch.uint8, (out_features, in_features // 2)),
            "weight_scale": TensorLayout(torch.float8_e4m3fn, (out_features, in_features // NVFP4_BLOCK)),
            "weight_scale_2": SCALAR,
        }
        return layout | ({"input_scale": SCALAR} if self.static else {})

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> dict[str, float | None]:
        input_scale = static_scale(inputs, self.input_scale_rule, NVFP4_LARGEST) if self.static else None
        amax = weight_amax(weights)
        global_scale = max(amax / NVFP4_LARGEST, SMALLEST_GLOBAL_SCALE) if amax else 1.0
        if self.search:
            global_scale *= _search_global_factor(sample_rows(weights, SEARCH_ROWS), global_scale)
        return {"weight_scale_2": global_scale, "input_scale": input_scale}

    def constants(self, fitted: dict[str, float | None]) -> dict[str, Tensor]:
        return scalars(**fitted)

    def quantize_rows(self, rows: Tensor, fitted: dict[str, float | None]) -> dict[str, Tensor]:
        global_scale = torch.tensor(fitted["weight_scale_2"], dtype=torch.float32, device=rows.device)
        return quantize_in_tiles(rows, lambda tile: self._quantize_tile(tile, global_scale))

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = decode_packed(tensors["weight"])
        scale = tensors["weight_scale"].float() * tensors["weight_scale_2"].float()
        return join_blocks(split_blocks(values, NVFP4_BLOCK).mul_(scale[..., None]), values.shape[1])

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return quantize_nvfp4_input(inputs, tensors["input_scale"].float()) if self.static else inputs.float()

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return (tensors["weight_scale"].float() * tensors["weight_scale_2"].float()).repeat_interleave(
            NVFP4_BLOCK, dim=1
        )

    def round_elements(self, values: Tensor) -> Tensor:
        return round_to_e2m1(values)

    def encode_elements(self, elements: Tensor) -> Tensor:
        return pack_nibbles(encode_e2m1(elements))

    def _quantize_tile(self, tile: Tensor, global_scale: Tensor) -> dict[str, Tensor]:
        blocks = split_blocks(tile, NVFP4_BLOCK)
        scale = nvfp4_scales(blocks, global_scale, search=self.search)
        elements = round_to_e2m1(blocks.div_((scale * global_scale)[..., None]))
        codes = encode_e2m1(join_blocks(elements, tile.shape[1]))
        return {"weight": pack_nibbles(codes), "weight_scale": scale.to(torch.float8_e4m3fn)}


def nvfp4_scales(blocks: Tensor, global_scale: Tensor, *, search: bool) -> Tensor:
    """The scale of each block: E4M3 values as float32 [rows, blocks].

    Args:
        blocks: float32 [rows, blocks, 16]
        global_scale: float32 []
        search: choose scales by error
    """
    scale = nvfp4_block_scale(block_amax(blocks), global_scale)
    return _search_block_scale(blocks, scale, global_scale)[0] if search else scale


def _search_block_scale(blocks: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The E4M3 scale of each block with the smallest squared error, and that error.

    Args:
        blocks: float32 [rows, blocks, 16]
        scale: where to start: E4M3 values as float32 [rows, blocks]
        global_scale: float32 []
    """
    scratch = (torch.empty_like(blocks), torch.empty_like(blocks), torch.empty_like(blocks))
    start = scale.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    candidates, errors = [], []
    for offset in CODE_OFFSETS:
        codes = (start + offset).clamp_(1, 0x7E).to(torch.uint8)  # positive E4M3 codes are ordered; 0x7E is 448
        candidate = codes.view(torch.float8_e4m3fn).float()
        candidates.append(candidate)
        errors.append(block_error(blocks, candidate * global_scale, E2M1, scratch).mul_(candidate).mul_(candidate))
    best_error, best = torch.stack(errors).min(dim=0)
    return torch.stack(candidates).gather(0, best[None])[0], best_error


def _search_global_factor(rows: Tensor, smallest: float) -> float:
    """Factor on the smallest global scale with which a sample of rows has the smallest error."""
    blocks = split_blocks(rows, NVFP4_BLOCK)
    amax = block_amax(blocks)
    errors = {}
    for factor in GLOBAL_FACTORS:
        global_scale = torch.tensor(smallest * factor, dtype=torch.float32, device=rows.device)
        _, error = _search_block_scale(blocks, nvfp4_block_scale(amax, global_scale), global_scale)
        errors[factor] = float(error.sum(dtype=torch.float64)) * factor**2
    return min(errors, key=lambda factor: errors[factor])
