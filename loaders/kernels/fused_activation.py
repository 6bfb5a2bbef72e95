"""Activation quantization as one kernel each on a CUDA device with Triton, and as `activation.py` has it elsewhere.

Both give the same codes and scales. To torch.compile the kernels are operators that it does not look into.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from omni_convert.loaders.kernels import activation

__all__ = ["LONGEST_ROW", "fp8_per_token", "fp8_per_token_op", "int8_per_token", "int8_per_token_op"]

HAS_TRITON = find_spec("triton") is not None
#: Elements of a token that the registers of one program hold.
LONGEST_ROW = 1 << 15


def fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `activation.fp8_per_token`."""
    if not _is_fused(x):
        return activation.fp8_per_token(x)
    codes, scale = fp8_per_token_op(x)
    return codes, scale


def int8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `activation.int8_per_token`."""
    if not _is_fused(x):
        return activation.int8_per_token(x)
    codes, scale = int8_per_token_op(x)
    return codes, scale


def _is_fused(x: Tensor) -> bool:
    return HAS_TRITON and x.device.type == "cuda" and x.shape[1] <= LONGEST_ROW


@torch.library.custom_op("omni_convert::fp8_per_token", mutates_args=())
def fp8_per_token_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel, on a device that Triton has."""
    from omni_convert.loaders.kernels.triton_activation import quantize_fp8

    return quantize_fp8(x)


@torch.library.custom_op("omni_convert::int8_per_token", mutates_args=())
def int8_per_token_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel, on a device that Triton has."""
    from omni_convert.loaders.kernels.triton_activation import quantize_int8

    return quantize_int8(x)


@fp8_per_token_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@int8_per_token_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
