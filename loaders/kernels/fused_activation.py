"""Activation quantization: one Triton kernel each on a CUDA device, `formats/arithmetic/input_codes.py` elsewhere.

Both give the same codes and scales. To torch.compile each kernel is an opaque operator. The static scale is the
exception: it needs no reduction, so the compiler fuses plain torch with the operations before it. Triton launches on
the current device, wherever its arguments are, so each operator makes the device of its input current.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.util import find_spec

import torch
from torch import Tensor

from omni_convert.formats.arithmetic import input_codes
from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK
from omni_convert.formats.arithmetic.swizzle import padded_scale_shape, swizzle_scales

__all__ = [
    "LONGEST_ROW",
    "fp8_per_group",
    "fp8_per_group_op",
    "fp8_per_token",
    "fp8_per_token_op",
    "fp8_static",
    "fp8_static_op",
    "int8_per_token",
    "int8_per_token_op",
    "mxfp8_swizzled",
    "mxfp8_swizzled_op",
    "nvfp4_swizzled",
    "nvfp4_swizzled_op",
    "on_device_of",
]

HAS_TRITON = find_spec("triton") is not None
#: Elements of a token that the registers of one program hold.
LONGEST_ROW = 1 << 15


def fp8_static(x: Tensor, input_scale: Tensor) -> Tensor:
    """Computes `input_codes.fp8_static`."""
    if not _has_kernels(x) or torch.compiler.is_compiling():
        return input_codes.fp8_static(x, input_scale)
    codes: Tensor = fp8_static_op(x, input_scale)
    return codes


def fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `input_codes.fp8_per_token`."""
    if not (_has_kernels(x) and x.shape[1] <= LONGEST_ROW):
        return input_codes.fp8_per_token(x)
    codes, scale = fp8_per_token_op(x)
    return codes, scale


def int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `input_codes.int8_per_token`."""
    if not (_has_kernels(x) and x.shape[1] <= LONGEST_ROW):
        return input_codes.int8_per_token(x)
    codes, scale = int8_per_token_op(x)
    return codes, scale


def fp8_per_group(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [M, K], and scales, float32 [M, ceil(K / group_size)], tokens next to each other."""
    if _has_kernels(x):
        codes, scale = fp8_per_group_op(x, group_size)
        return codes, scale
    blocks, scale = input_codes.fp8_per_group(x, group_size)
    return blocks.flatten(1)[:, : x.shape[1]].contiguous(), scale.squeeze(2).t().contiguous().t()


def mxfp8_swizzled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [M, K], and E8M0 scales, uint8 [scales], in cuBLAS's order with its padding."""
    if _has_kernels(x):
        codes, scale = mxfp8_swizzled_op(x)
        return codes, scale
    codes, scale = input_codes.mxfp8(x)
    return codes, swizzle_scales(scale).flatten()


def nvfp4_swizzled(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes, uint8 [M, K / 2], and scales, float8_e4m3fn [scales], in cuBLAS's order with its padding."""
    if _has_kernels(x):
        codes, scale = nvfp4_swizzled_op(x, input_scale)
        return codes, scale
    codes, scale = input_codes.nvfp4(x, input_scale)
    return codes, swizzle_scales(scale).flatten()


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes the device of a tensor the current one, on which Triton launches; nothing for a CPU."""
    current: AbstractContextManager[None] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]  # of torch
    return current


def _has_kernels(x: Tensor) -> bool:
    return HAS_TRITON and x.device.type == "cuda"


@torch.library.custom_op("omni_convert::fp8_static", mutates_args=())
def fp8_static_op(x: Tensor, input_scale: Tensor) -> Tensor:
    """The fused kernel, on a device that Triton has."""
    from omni_convert.loaders.kernels.triton.activation import quantize_fp8_static

    with on_device_of(x):
        return quantize_fp8_static(x, input_scale)


@torch.library.custom_op("omni_convert::fp8_per_token", mutates_args=())
def fp8_per_token_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel, on a device that Triton has."""
    from omni_convert.loaders.kernels.triton.activation import quantize_fp8

    with on_device_of(x):
        return quantize_fp8(x)


@torch.library.custom_op("omni_convert::int8_per_token", mutates_args=())
def int8_per_token_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel, on a device that Triton has."""
    from omni_convert.loaders.kernels.triton.activation import quantize_int8

    with on_device_of(x):
        return quantize_int8(x)


@torch.library.custom_op("omni_convert::fp8_per_group", mutates_args=())
def fp8_per_group_op(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The fused kernel, on a device that Triton has; for powers of two of 16 to 512."""
    from omni_convert.loaders.kernels.triton.block_activation import quantize_groups

    with on_device_of(x):
        return quantize_groups(x, group_size)


@torch.library.custom_op("omni_convert::mxfp8_swizzled", mutates_args=())
def mxfp8_swizzled_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel, on a device that Triton has."""
    from omni_convert.loaders.kernels.triton.block_activation import quantize_mxfp8

    with on_device_of(x):
        return quantize_mxfp8(x)


@torch.library.custom_op("omni_convert::nvfp4_swizzled", mutates_args=())
def nvfp4_swizzled_op(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel, on a device that Triton has."""
    from omni_convert.loaders.kernels.triton.block_activation import quantize_nvfp4

    with on_device_of(x):
        return quantize_nvfp4(x, input_scale)


@fp8_static_op.register_fake
def _(x: Tensor, _input_scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn)


@fp8_per_token_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@int8_per_token_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@fp8_per_group_op.register_fake
def _(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    scale = x.new_empty(-(-x.shape[1] // group_size), x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale.t()


@mxfp8_swizzled_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, groups = padded_scale_shape(x.shape[0], -(-x.shape[1] // MX_BLOCK))
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(rows * groups, dtype=torch.uint8)


@nvfp4_swizzled_op.register_fake
def _(x: Tensor, _input_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, groups = padded_scale_shape(x.shape[0], x.shape[1] // NVFP4_BLOCK)
    codes = x.new_empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    return codes, x.new_empty(rows * groups, dtype=torch.float8_e4m3fn)
