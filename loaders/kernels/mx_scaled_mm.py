"""MXFP8 and NVFP4 through torch's scaled_mm on Blackwell: block scales in cuBLAS's order on both sides.

Not run on hardware: nobody has yet run these kernels on a GPU of compute capability 10 or more. Tests check what
scaled_mm receives, and that torch's own checks of shapes and dtypes accept it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType

from omni_convert.formats.arithmetic.swizzle import swizzle_scales
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.fused_activation import mxfp8_swizzled, nvfp4_swizzled
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["MXFP8_SCALED_MM", "NVFP4_SCALED_MM", "run_mxfp8", "run_nvfp4"]

ScaledMm = Callable[..., Tensor]


def run_mxfp8(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    _fmt: Format,
    bias: Tensor | None,
    scaled_mm: ScaledMm = F.scaled_mm,
) -> Tensor:
    """`RunLinear`; `scaled_mm` is replaced to see what it receives."""
    codes, scale = mxfp8_swizzled(x)
    out = scaled_mm(
        codes,
        tensors["weight"].t(),
        scale.view(torch.float8_e8m0fnu),
        ScalingType.BlockWise1x32,
        _swizzled(tensors["weight_scale"]).view(torch.float8_e8m0fnu),
        ScalingType.BlockWise1x32,
        swizzle_a=SwizzleType.SWIZZLE_32_4_4,
        swizzle_b=SwizzleType.SWIZZLE_32_4_4,
        bias=None if bias is None else bias.bfloat16(),
        output_dtype=torch.bfloat16,
    )
    return out.to(x.dtype)


def run_nvfp4(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    _fmt: Format,
    bias: Tensor | None,
    scaled_mm: ScaledMm = F.scaled_mm,
) -> Tensor:
    """`RunLinear`; `scaled_mm` is replaced to see what it receives."""
    input_scale = tensors["input_scale"].float().reshape(())
    codes, scale = nvfp4_swizzled(x, input_scale)
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    out = scaled_mm(
        codes.view(torch.float4_e2m1fn_x2),
        tensors["weight"].view(torch.float4_e2m1fn_x2).t(),
        [scale, input_scale.reshape(1)],
        recipe,
        [_swizzled(tensors["weight_scale"]), tensors["weight_scale_2"].float().reshape(1)],
        recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        bias=None if bias is None else bias.bfloat16(),
        output_dtype=torch.bfloat16,
    )
    return out.to(x.dtype)


def _swizzled(scale: Tensor) -> Tensor:
    # Once per call for the weight, too: a fiftieth of its bytes, and offloading may bring a fresh copy for every call.
    return swizzle_scales(scale).flatten()


MXFP8_SCALED_MM = Kernel(
    "mxfp8_scaled_mm",
    is_scaled_gemm=True,
    requirements=Requirements((Mxfp8,), devices=("cuda",), capability=(10, 0), cuda=(12, 8), multiple_of=32),
    run=run_mxfp8,
)
NVFP4_SCALED_MM = Kernel(
    "nvfp4_scaled_mm",
    is_scaled_gemm=True,
    requirements=Requirements(
        (Nvfp4,), devices=("cuda",), capability=(10, 0), cuda=(12, 8), multiple_of=32, has_input_scale=True
    ),
    run=run_nvfp4,
)
