"""Weights decoded inside the GEMM, for CUDA devices without a scaled GEMM for them, and for bf16 activations.

As `decode_mm.py`, without the decoded weight in between, and without rounding scales to bfloat16. Not run on hardware,
see `triton_mm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.mx import COARSE_BLOCK
from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.int8 import Int8
from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import Mxfp8
from omni_convert.formats.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.fused_activation import on_device_of
from omni_convert.loaders.kernels.kernel import Kernel, Requirements
from omni_convert.loaders.kernels.reference import rounded_input, smoothed_input
from omni_convert.loaders.memory.packed_int4 import CODES, SCALES, ZERO_POINTS, PackedInt4, weight_shape

__all__ = ["TRITON_DECODE_MM", "TRITON_DECODE_WEIGHT_MM", "run_fused"]


@dataclass(frozen=True)
class _Operands:
    """Suffixes of the tensors that the kernel takes, "" for none; see `triton_mm.multiply`."""

    weight: str = "weight"
    block_scale: str = ""
    group_scale: str = ""
    zero_points: str = ""
    unit: str = ""


_OPERANDS: dict[type[Format], _Operands] = {
    Fp8: _Operands(unit="weight_scale"),
    Fp8Channel: _Operands(unit="weight_scale"),
    Fp8Block: _Operands(group_scale="weight_scale_inv"),
    Int8: _Operands(unit="weight_scale"),
    Mxfp8: _Operands(block_scale="weight_scale"),
    Mxfp4: _Operands(block_scale="weight_scale"),
    Mxfp4DualScale: _Operands(block_scale="weight_scale", group_scale="weight_dual_scale"),
    Nvfp4: _Operands(block_scale="weight_scale", unit="weight_scale_2"),
    PackedInt4: _Operands(weight=CODES, group_scale=SCALES, zero_points=ZERO_POINTS),
}


@torch.library.custom_op("omni_convert::triton_decode_mm", mutates_args=())
def _triton_decode_mm(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    group_scale: Tensor | None,
    zero_points: Tensor | None,
    unit: Tensor | None,
    bias: Tensor | None,
    group_shape: list[int],
    outputs: int,
    dtype: torch.dtype,
) -> Tensor:
    from omni_convert.loaders.kernels.triton.matmul import multiply

    group = (group_shape[0], group_shape[1])
    with on_device_of(x):
        return multiply(x, weight, block_scale, group_scale, zero_points, unit, bias, group, outputs, dtype)


@_triton_decode_mm.register_fake
def _(
    x: Tensor,
    _weight: Tensor,
    _block_scale: Tensor | None,
    _group_scale: Tensor | None,
    _zero_points: Tensor | None,
    _unit: Tensor | None,
    _bias: Tensor | None,
    _group_shape: list[int],
    outputs: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=dtype)


def run_fused(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None, is_rounded: bool) -> Tensor:
    """`RunLinear`, with the input rounded as the runtime does, or only smoothed."""
    inputs = rounded_input(x, tensors, fmt) if is_rounded else smoothed_input(x, tensors)
    operands = _OPERANDS[type(fmt)]
    out: Tensor = _triton_decode_mm(
        inputs.bfloat16(),
        tensors[operands.weight],
        tensors.get(operands.block_scale),
        _group_scale(tensors, fmt),
        tensors.get(operands.zero_points),
        tensors.get(operands.unit),
        bias,
        list(_group_shape(fmt)),
        weight_shape(tensors)[0],
        x.dtype,
    )
    return out


def _group_shape(fmt: Format) -> tuple[int, int]:
    """Rows and columns that share a scale with more bits than bfloat16 has; (1, 0) where there is none."""
    if isinstance(fmt, Fp8Block):
        return fmt.block_size
    if isinstance(fmt, PackedInt4):
        return 1, fmt.group
    return 1, COARSE_BLOCK if isinstance(fmt, Mxfp4DualScale) else 0


def _group_scale(tensors: Mapping[str, Tensor], fmt: Format) -> Tensor | None:
    """[rows, columns] of groups, or None."""
    scale = tensors.get(_OPERANDS[type(fmt)].group_scale)
    if isinstance(fmt, PackedInt4) and scale is not None:
        return scale.t()
    return scale.flatten(1) if scale is not None else None


FORMATS = tuple(_OPERANDS)
# What the tensor cores multiply at a time along K must lie within one group.
GROUP_MULTIPLE = 16
REQUIREMENTS = Requirements(
    FORMATS, devices=("cuda",), capability=(8, 0), module="triton", group_multiple=GROUP_MULTIPLE
)
TRITON_DECODE_MM = Kernel(
    "triton_decode_mm",
    is_scaled_gemm=False,
    requirements=REQUIREMENTS,
    run=partial(run_fused, is_rounded=True),
)
TRITON_DECODE_WEIGHT_MM = Kernel(
    "triton_decode_weight_mm",
    is_scaled_gemm=False,
    requirements=replace(REQUIREMENTS, activations=("bf16",)),
    run=partial(run_fused, is_rounded=False),
)
