"""MXFP8, MXFP4 and dual-scale MXFP4 through torch_npu on Ascend 950: the operators that vLLM-Omni calls.

Not run on hardware: nobody has yet run these kernels on an NPU. They follow torch_npu's documented signatures,

    npu_dynamic_mx_quant(input, *, axis, round_mode, dst_type, block_size, scale_alg) -> codes, scale [M, K / 64, 2]
    npu_quant_matmul(x1, x2, scale, *, pertoken_scale, bias, output_dtype, x1_dtype, x2_dtype, scale_dtype,
                     pertoken_scale_dtype, group_sizes)
    npu_dynamic_dual_level_mx_quant(input, *, smooth_scale, round_mode) -> codes, level 0 scale, level 1 scale
    npu_dual_level_quant_matmul(x1, x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale, bias,
                                output_dtype), x2 in the device's own NZ layout

and tests check what the operators receive. The input is multiplied by mul_scale here: smooth_scale is documented as
not supported yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.arithmetic.smoothing import smoothed_input
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["NPU_MXFP4", "NPU_MXFP4_DUALSCALE", "NPU_MXFP8", "run_mxfp4", "run_mxfp4_dualscale", "run_mxfp8"]

MODULE = "torch_npu"
GROUP_SIZES = [1, 1, MX_BLOCK]
NZ_LAYOUT = 29
OUTPUT_DTYPES = (torch.bfloat16, torch.float16)


def run_mxfp8(x: Tensor, tensors: Mapping[str, Tensor], _fmt: Format, bias: Tensor | None, npu: Any = None) -> Tensor:
    """`RunLinear`; `npu` stands in for torch_npu to see what its operators receive."""
    npu = npu or import_module(MODULE)
    return _to(_run_mx(npu, _half(x), tensors, bias, torch.float8_e4m3fn), x.dtype)


def run_mxfp4(x: Tensor, tensors: Mapping[str, Tensor], _fmt: Format, bias: Tensor | None, npu: Any = None) -> Tensor:
    """`RunLinear`; `npu` stands in for torch_npu to see what its operators receive."""
    npu = npu or import_module(MODULE)
    element = npu.float4_e2m1fn_x2  # which torch has no tensors of: both sides are bytes, and must be told apart
    inputs = smoothed_input(_half(x), tensors)
    return _to(_run_mx(npu, inputs, tensors, bias, element, x1_dtype=element, x2_dtype=element), x.dtype)


def _run_mx(
    npu: Any, inputs: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, element: Any, **dtypes: Any
) -> Tensor:
    """One level of scales on both sides; `dtypes` are for the GEMM alone."""
    codes, scale = npu.npu_dynamic_mx_quant(
        inputs, axis=-1, round_mode="rint", dst_type=element, block_size=MX_BLOCK, scale_alg=0
    )
    out: Tensor = npu.npu_quant_matmul(
        codes,
        tensors["weight"].t(),
        _paired(tensors["weight_scale"]).transpose(0, 1),
        scale_dtype=npu.float8_e8m0fnu,
        pertoken_scale=scale,
        pertoken_scale_dtype=npu.float8_e8m0fnu,
        bias=_float(bias),
        output_dtype=inputs.dtype,
        group_sizes=GROUP_SIZES,
        **dtypes,
    )
    return out


def run_mxfp4_dualscale(
    x: Tensor, tensors: Mapping[str, Tensor], _fmt: Format, bias: Tensor | None, npu: Any = None
) -> Tensor:
    """`RunLinear`; `npu` stands in for torch_npu to see what its operators receive."""
    npu = npu or import_module(MODULE)
    inputs = smoothed_input(_half(x), tensors)
    codes, level0, level1 = npu.npu_dynamic_dual_level_mx_quant(inputs, round_mode="rint")
    # Another layout, not other codes. Once per call: offloading brings a fresh copy of the weight for every call.
    weight = npu.npu_format_cast(tensors["weight"].view(torch.int8), NZ_LAYOUT, customize_dtype=torch.int8)
    out = npu.npu_dual_level_quant_matmul(
        codes,
        weight,
        level0,
        tensors["weight_dual_scale"].squeeze(-1).t().contiguous(),
        level1,
        _paired(tensors["weight_scale"]),
        bias=_float(bias),
        output_dtype=inputs.dtype,
    )
    return _to(out, x.dtype)


def _half(x: Tensor) -> Tensor:
    return x if x.dtype in OUTPUT_DTYPES else x.bfloat16()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _to(out: Tensor, dtype: torch.dtype) -> Tensor:
    return out if out.dtype is dtype else out.to(dtype)


def _paired(scale: Tensor) -> Tensor:
    """[out, G] to [out, ceil(G / 2), 2], filled with byte 0, as the runtime does after loading."""
    if scale.shape[1] % 2:
        scale = F.pad(scale, (0, 1))
    return scale.reshape(len(scale), -1, 2)


NPU_MXFP8 = Kernel(
    "npu_mxfp8",
    is_scaled_gemm=True,
    requirements=Requirements((Mxfp8,), devices=("npu",), module=MODULE),
    run=run_mxfp8,
)
NPU_MXFP4 = Kernel(
    "npu_mxfp4",
    is_scaled_gemm=True,
    requirements=Requirements((Mxfp4,), devices=("npu",), multiple_of=2, module=MODULE),
    run=run_mxfp4,
)
NPU_MXFP4_DUALSCALE = Kernel(
    "npu_mxfp4_dualscale",
    is_scaled_gemm=True,
    requirements=Requirements((Mxfp4DualScale,), devices=("npu",), module=MODULE),
    run=run_mxfp4_dualscale,
)
