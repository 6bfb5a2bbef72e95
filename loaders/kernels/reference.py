"""Reference: dequantize everything and multiply in float32.

It is slow, runs anywhere, and is what every other kernel is tested against.
With `bf16` activations, the input is left alone and the decoded weight is multiplied in the dtype of the input. That is
also all there is to W4A16, and to an nvfp4 layer without input_scale, which the runtime runs alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.activation import (
    quantize_mxfp4_dualscale_input,
    quantize_mxfp4_input,
    quantize_mxfp8_input,
    quantize_nvfp4_input,
)
from omni_convert.formats.arithmetic.float8 import E4M3
from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.int8 import Int8
from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import Mxfp8
from omni_convert.formats.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.activation import fp8_per_group, fp8_per_token, fp8_static, int8_per_token
from omni_convert.loaders.kernels.kernel import Kernel, Requirements
from omni_convert.loaders.memory.layout import disk_tensors
from omni_convert.loaders.memory.packed_int4 import PackedInt4
from omni_convert.loaders.memory.scratch import Scratch

__all__ = ["REFERENCE", "WEIGHT_ONLY", "rounded_input", "smoothed_input"]

_SCRATCH = Scratch()


def _round_e4m3_(values: Tensor) -> Tensor:
    scratch = _SCRATCH.take(values.numel(), values.dtype, values.device).view(values.shape)
    return E4M3.round(values, out=values, scratch=scratch)


def _round_fp8(x: Tensor, tensors: Mapping[str, Tensor], fmt: Fp8) -> Tensor:
    if fmt.static:
        return fp8_static(x, tensors["input_scale"], _round_e4m3_).mul_(tensors["input_scale"])
    values, scale = fp8_per_token(x, _round_e4m3_)
    return values.mul_(scale)


def _round_fp8_channel(x: Tensor, _tensors: Mapping[str, Tensor], _fmt: Fp8Channel) -> Tensor:
    values, scale = fp8_per_token(x, _round_e4m3_)
    return values.mul_(scale)


def _round_fp8_block(x: Tensor, _tensors: Mapping[str, Tensor], fmt: Fp8Block) -> Tensor:
    values, scale = fp8_per_group(x, fmt.block_size[1], _round_e4m3_)
    return values.mul_(scale).flatten(1)[:, : x.shape[1]]


def _round_int8(x: Tensor, _tensors: Mapping[str, Tensor], _fmt: Int8) -> Tensor:
    codes, scale = int8_per_token(x)
    return codes.float() * scale


def _round_mxfp8(x: Tensor, _tensors: Mapping[str, Tensor], _fmt: Mxfp8) -> Tensor:
    return quantize_mxfp8_input(x)


def _round_mxfp4(x: Tensor, tensors: Mapping[str, Tensor], _fmt: Mxfp4) -> Tensor:
    return quantize_mxfp4_input(smoothed_input(x, tensors))


def _round_mxfp4_dualscale(x: Tensor, tensors: Mapping[str, Tensor], _fmt: Mxfp4DualScale) -> Tensor:
    return quantize_mxfp4_dualscale_input(smoothed_input(x, tensors))


def _round_nvfp4(x: Tensor, tensors: Mapping[str, Tensor], fmt: Nvfp4) -> Tensor:
    return quantize_nvfp4_input(x, tensors["input_scale"].float()) if fmt.static else x.float()


_ROUND_INPUT: dict[type[Format], Callable[..., Tensor]] = {
    Fp8: _round_fp8,
    Fp8Channel: _round_fp8_channel,
    Fp8Block: _round_fp8_block,
    Int8: _round_int8,
    Mxfp8: _round_mxfp8,
    Mxfp4: _round_mxfp4,
    Mxfp4DualScale: _round_mxfp4_dualscale,
    Nvfp4: _round_nvfp4,
    PackedInt4: lambda x, _tensors, _fmt: x.float(),
}


def smoothed_input(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The input [M, in] times mul_scale, if there is one, in the dtype of the input, as the runtime computes it."""
    return x * tensors["mul_scale"].to(x.dtype) if "mul_scale" in tensors else x


def rounded_input(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """The input [M, in] as the runtime's GEMM sees it: smoothed, quantized and restored, float32."""
    return _ROUND_INPUT[type(fmt)](x.detach(), tensors, fmt)  # rounding has no derivative


def _stored_weight(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """The weight that the runtime's GEMM sees, float32 [out, in]: without mul_scale, which is in the input."""
    tensors = disk_tensors(fmt, tensors, x.shape[1])
    if "mul_scale" in tensors:
        tensors["mul_scale"] = torch.ones_like(tensors["mul_scale"])
    return fmt.dequantize(tensors)


def _run_reference(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.float()
    return F.linear(rounded_input(x, tensors, fmt), _stored_weight(x, tensors, fmt), bias).to(x.dtype)


def _run_weight_only(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    weight = fmt.dequantize(disk_tensors(fmt, tensors, x.shape[1]))
    return F.linear(x, weight.to(x.dtype), bias)


REFERENCE = Kernel(
    "reference", is_scaled_gemm=False, requirements=Requirements(tuple(_ROUND_INPUT)), run=_run_reference
)
WEIGHT_ONLY = Kernel(
    "weight_only",
    is_scaled_gemm=False,
    requirements=Requirements((Format,), activations=("bf16",)),
    run=_run_weight_only,
)
