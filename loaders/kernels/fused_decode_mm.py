"""4-bit and MX weights decoded inside the GEMM, for CUDA devices without a scaled GEMM for them, and bf16 activations.

As `decode_mm.py`, without the decoded weight in between. Not run on hardware, see `triton_mm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from omni_convert.formats.format import Format
from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.mxfp8 import Mxfp8
from omni_convert.formats.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.kernel import Kernel, Requirements
from omni_convert.loaders.kernels.reference import rounded_input, smoothed_input

__all__ = ["TRITON_DECODE_MM", "TRITON_DECODE_WEIGHT_MM", "run_fused"]

FORMATS = (Mxfp4, Nvfp4, Mxfp8)


@torch.library.custom_op("omni_convert::triton_decode_mm", mutates_args=())
def _triton_decode_mm(
    x: Tensor, weight: Tensor, scale: Tensor, unit: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from omni_convert.loaders.kernels.triton_mm import multiply

    return multiply(x, weight, scale, unit, bias, dtype)


@_triton_decode_mm.register_fake
def _(
    x: Tensor, weight: Tensor, _scale: Tensor, _unit: Tensor | None, _bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def run_fused(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None, is_rounded: bool) -> Tensor:
    """`RunLinear`, with the input rounded as the runtime does, or only smoothed."""
    inputs = rounded_input(x, tensors, fmt) if is_rounded else smoothed_input(x, tensors)
    unit = tensors["weight_scale_2"].float().reshape(()) if isinstance(fmt, Nvfp4) else None
    weight, scale = tensors["weight"], tensors["weight_scale"]
    out: Tensor = _triton_decode_mm(inputs.bfloat16(), weight, scale, unit, bias, x.dtype)
    return out


TRITON_DECODE_MM = Kernel(
    "triton_decode_mm",
    is_scaled_gemm=False,
    requirements=Requirements(FORMATS, devices=("cuda",), capability=(8, 0), module="triton"),
    run=partial(run_fused, is_rounded=True),
)
TRITON_DECODE_WEIGHT_MM = Kernel(
    "triton_decode_weight_mm",
    is_scaled_gemm=False,
    requirements=Requirements(FORMATS, activations=("bf16",), devices=("cuda",), capability=(8, 0), module="triton"),
    run=partial(run_fused, is_rounded=False),
)
