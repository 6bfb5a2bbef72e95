"""Weights decoded inside the GEMM, for CUDA devices without a scaled GEMM for them, and for bf16 activations.

The result is that of `decode_mm.py`, but no decoded weight is stored and no scale is rounded to bfloat16. Not run on
hardware; see `triton/matmul.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from omni_convert.formats.format import Format
from omni_convert.loaders.kernels.decoding import DECODERS, Operands
from omni_convert.loaders.kernels.fused_activation import on_device_of
from omni_convert.loaders.kernels.kernel import Kernel, Requirements, rounded_input
from omni_convert.loaders.memory.layout import weight_shape

__all__ = ["TRITON_DECODE_MM", "TRITON_DECODE_WEIGHT_MM", "run_fused"]


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
    inputs = rounded_input(x, tensors, fmt) if is_rounded else fmt.scale_inputs(x, tensors)
    operands = DECODERS[type(fmt)].operands
    assert operands is not None, "the kernel declines such formats"
    out: Tensor = _triton_decode_mm(
        inputs.bfloat16(),
        tensors[operands.weight],
        tensors.get(operands.block_scale),
        _group_scale(tensors, operands),
        tensors.get(operands.zero_points),
        tensors.get(operands.unit),
        bias,
        list(_group_shape(fmt, operands)),
        weight_shape(tensors)[0],
        x.dtype,
    )
    return out


def _group_shape(fmt: Format, operands: Operands) -> tuple[int, int]:
    """Rows and columns that share a scale with more bits than bfloat16 has; (1, 0) where there is none."""
    if not operands.group_scale or fmt.encoding is None:
        return 1, 0
    rows, columns = fmt.encoding.outer_block or fmt.encoding.block
    return rows or 1, columns or 0


def _group_scale(tensors: Mapping[str, Tensor], operands: Operands) -> Tensor | None:
    """[rows, columns] of groups, or None."""
    scale = tensors.get(operands.group_scale)
    if scale is None:
        return None
    return scale.t() if operands.is_turned else scale.flatten(1)


# The elements along K that tensor cores multiply at once must lie within one group.
GROUP_MULTIPLE = 16
REQUIREMENTS = Requirements(
    tuple(fmt for fmt, decoder in DECODERS.items() if decoder.operands is not None),
    devices=("cuda",),
    capability=(8, 0),
    module="triton",
    group_multiple=GROUP_MULTIPLE,
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
