"""How runtimes quantize activations before a GEMM: the reference for kernels and for calibration.

Pure functions. Each takes activations [..., K] of any float dtype and returns the values that the GEMM multiplies,
scales applied, in float32. All round half to even (`rint`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1
from omni_convert.formats.arithmetic.e8m0 import power_of_two
from omni_convert.formats.arithmetic.element import ElementType
from omni_convert.formats.arithmetic.float8 import E4M3
from omni_convert.formats.arithmetic.mx import (
    COARSE_BLOCK,
    MX_BLOCK,
    block_amax,
    join_blocks,
    scale_blocks_,
    split_blocks,
)
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK, nvfp4_block_scale

__all__ = ["quantize_mxfp4_dualscale_input", "quantize_mxfp4_input", "quantize_mxfp8_input", "quantize_nvfp4_input"]


def quantize_mxfp8_input(inputs: Tensor) -> Tensor:
    """E4M3 per 32 along K, exponents by the floor rule (`npu_dynamic_mx_quant` to e4m3fn)."""
    return _quantize_mx(inputs, E4M3, "floor")


def quantize_mxfp4_input(inputs: Tensor, scale_algorithm: int = 0) -> Tensor:
    """E2M1 per 32 along K (`npu_dynamic_mx_quant` to float4_e2m1fn_x2).

    Args:
        inputs: activations, already multiplied by mul_scale
        scale_algorithm: the runtime's `mxfp4_scale_alg`: 0 is the floor rule, 2 is amax / 7.25 up to a power of two
    """
    return _quantize_mx(inputs, E2M1, {0: "floor", 2: "uos"}[scale_algorithm])


def quantize_mxfp4_dualscale_input(inputs: Tensor) -> Tensor:
    """E2M1 with a float32 scale per 512 and an exponent per 32 (`npu_dynamic_dual_level_mx_quant`).

    The quotient by the first level is rounded to the dtype of the inputs, as the operator does.

    Args:
        inputs: activations, already multiplied by mul_scale
    """
    columns = inputs.shape[-1]
    groups = split_blocks(inputs, COARSE_BLOCK)
    level0 = block_amax(groups) * torch.tensor(1 / 6, dtype=torch.float32, device=inputs.device)
    level0 = torch.where(level0 == 0, 1.0, level0)[..., None]
    fine = split_blocks(groups.div_(level0).to(inputs.dtype), MX_BLOCK)  # [..., groups, 16, 32]
    exponent = scale_blocks_(fine, E2M1, "floor")
    E2M1.round(fine, out=fine).mul_(power_of_two(exponent)[..., None])
    return join_blocks(fine.flatten(-2).mul_(level0), columns)


def quantize_nvfp4_input(inputs: Tensor, input_scale: Tensor) -> Tensor:
    """E2M1 per 16 with an E4M3 scale, over the static `input_scale`, float32 []."""
    blocks = split_blocks(inputs, NVFP4_BLOCK)
    scale = (nvfp4_block_scale(block_amax(blocks), input_scale) * input_scale)[..., None]
    return join_blocks(E2M1.round(blocks.div_(scale)).mul_(scale), inputs.shape[-1])


def _quantize_mx(inputs: Tensor, element: ElementType, rule: str) -> Tensor:
    blocks = split_blocks(inputs, MX_BLOCK)
    exponent = scale_blocks_(blocks, element, rule)
    return join_blocks(element.round(blocks, out=blocks).mul_(power_of_two(exponent)[..., None]), inputs.shape[-1])
