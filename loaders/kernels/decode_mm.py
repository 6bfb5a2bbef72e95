"""A GEMM in bfloat16 on decoded weights, for devices and formats without a scaled GEMM, and for bf16 activations.

What the runtime multiplies, codes times their scales, is decoded on both sides to bfloat16, which holds it exactly or
within 2^-8 (see `decoding.py`); products are accumulated in float32. On a CPU that is faster than torch's scaled_mm,
which has no hardware for float8 there: weights are decoded a tile at a time, in cache, into a buffer that the GEMM
takes as soon as it is full, so that no whole weight in bfloat16 ever exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.arithmetic.scratch import Scratch
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.loaders.kernels.decoding import DECODERS, decode_rows, padded_columns, weight_unit
from omni_convert.loaders.kernels.kernel import Kernel, Requirements, rounded_input
from omni_convert.loaders.memory.layout import weight_shape

__all__ = ["CPU_DECODE_MM", "DECODE_MM", "DECODE_WEIGHT_MM"]

# Elements of a tile: of bfloat16 or float32 with a scratch or two, it stays in the second-level cache of a core or two.
CPU_TILE = 1 << 19
# Elements of the weight that one GEMM takes, at most: few enough for the third-level cache and for `Scratch`.
CPU_CHUNK = 4 << 20
ACCELERATOR_CHUNK = 1 << 26

_WEIGHT = Scratch()


def _decode_mm(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None, is_rounded: bool) -> Tensor:
    """`RunLinear`, with the input rounded as the runtime does, or only scaled."""
    out = _decoded_product(x, tensors, fmt, bias, is_rounded)
    side = fmt.side_product(x, tensors)
    return out if side is None else out.add_(side)


def _decoded_product(
    x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None, is_rounded: bool
) -> Tensor:
    columns = x.shape[1]
    inputs = _prepare_input(x, tensors, fmt, is_rounded)
    bias = None if bias is None else bias.bfloat16()
    rows, _ = weight_shape(tensors)
    step = _chunk_rows((CPU_CHUNK if x.device.type == "cpu" else ACCELERATOR_CHUNK) // inputs.shape[1])
    if rows <= step:
        return F.linear(inputs, _decode(fmt, tensors, 0, rows, columns), bias).to(x.dtype)
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = _decode(fmt, tensors, start, stop, columns)
        out[:, start:stop] = F.linear(inputs, weight, None if bias is None else bias[start:stop])
    return out


def _chunk_rows(most: int) -> int:
    """A power of two: other numbers of rows do not fill a GEMM's tiles, which costs some 5 %."""
    return 1 << max(most, 1).bit_length() - 1


def _prepare_input(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, is_rounded: bool) -> Tensor:
    """The left operand, bfloat16 [M, padded columns], multiplied by the unit that decoded weights lack."""
    rows, columns = x.shape
    unit = weight_unit(fmt, tensors)
    inputs = x.new_zeros(rows, padded_columns(fmt, columns), dtype=torch.bfloat16)
    step = max(1, CPU_TILE // columns) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        tile = x[start : start + step]
        values = rounded_input(tile, tensors, fmt) if is_rounded else fmt.scale_inputs(tile, tensors).float()
        inputs[start : start + step, :columns] = values * unit
    return inputs


def _decode(fmt: Format, tensors: Mapping[str, Tensor], start: int, stop: int, columns: int) -> Tensor:
    """Rows `start` to `stop` in bfloat16, decoded a tile at a time."""
    width = padded_columns(fmt, columns)
    device = next(iter(tensors.values())).device
    weight = _WEIGHT.take((stop - start) * width, torch.bfloat16, device).view(stop - start, width)
    step = max(1, CPU_TILE // width) if device.type == "cpu" else stop - start
    for first in range(0, stop - start, step):
        decode_rows(fmt, tensors, start + first, columns, weight[first : first + step])
    return weight


# Formats of compiled layers, each by a string, which an argument of an operator can be.
_COMPILED: dict[str, Format] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]  # torch leaves it untyped
def _key(fmt: Format) -> str:
    key = repr(fmt)
    _COMPILED[key] = fmt
    return key


# torch.compile would unroll the loops over tiles, and a graph cannot hold a format: the compiler sees one operator.
@torch.library.custom_op("omni_convert::decode_mm", mutates_args=())
def _decode_mm_op(
    x: Tensor, tensors: list[Tensor], suffixes: str, fmt: str, bias: Tensor | None, rounded: bool
) -> Tensor:
    return _decode_mm(x, dict(zip(suffixes.split(), tensors, strict=True)), _COMPILED[fmt], bias, rounded)


@_decode_mm_op.register_fake
def _(x: Tensor, tensors: list[Tensor], suffixes: str, *_: object) -> Tensor:
    shape = weight_shape(dict(zip(suffixes.split(), tensors, strict=True)))
    return x.new_empty(x.shape[0], shape[0])  # `len` would make the number of rows a constant of the graph


def _run(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None, is_rounded: bool = True) -> Tensor:
    # An operator without a derivative raises in `backward`; the loops over tiles would give a wrong derivative.
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    if not (needs_gradient or torch.compiler.is_compiling()):
        return _decode_mm(x, tensors, fmt, bias, is_rounded)
    out: Tensor = _decode_mm_op(x, list(tensors.values()), " ".join(tensors), _key(fmt), bias, is_rounded)
    return out


# All with a decoder of their own but INT8, whose GEMM in integers is faster.
FASTER_DECODED = tuple(fmt for fmt in DECODERS if fmt is not Int8)
CPU_DECODE_MM = Kernel(
    "cpu_decode_mm",
    is_scaled_gemm=False,
    requirements=Requirements(FASTER_DECODED, devices=("cpu",)),
    run=_run,
)
DECODE_MM = Kernel("decode_mm", is_scaled_gemm=False, requirements=Requirements((Format,)), run=_run)
DECODE_WEIGHT_MM = Kernel(
    "decode_weight_mm",
    is_scaled_gemm=False,
    requirements=Requirements((Format,), activations=("bf16",)),
    run=partial(_run, is_rounded=False),
)
