"""Per-token activation quantization in Triton, a token a program: its row is read once, its codes are written once.

The arithmetic is that of `activation.py`, bit for bit: true division, rounding half to even, NaN kept. Not run on
hardware: tests run these kernels in Triton's interpreter, and compile them for each architecture that may run them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Triton gives the arguments of a kernel their types, and its decorators have none.)

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an optional dependency
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from omni_convert.formats.fp8 import E4M3_MAX
from omni_convert.formats.int8 import INT8_MAX
from omni_convert.loaders.kernels.activation import SMALLEST_INT8_AMAX, SMALLEST_TOKEN_SCALE

__all__ = ["fp8_kernel", "int8_kernel", "quantize_fp8", "quantize_int8"]

# Elements of a row that a thread holds in registers; with fewer, short rows leave threads of a warp without work.
ELEMENTS_PER_THREAD = 32
WARP = 32
MOST_WARPS = 16
# Added and taken away again, it leaves a float32 below 2^22 without fraction, rounded half to even.
ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _load_row(x_ptr, stride, columns, BLOCK: tl.constexpr):  # noqa: N803  # constants of a kernel are in capitals
    """The values of this program's row in float32, zeros beyond its end, and their amax, NaN if any value is."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x_ptr + row * stride + column, mask=column < columns, other=0.0).to(tl.float32)
    is_nan = tl.max((values != values).to(tl.int32), axis=0)  # NaN alone differs from itself
    amax = tl.where(is_nan != 0, float("nan"), tl.max(tl.abs(values), axis=0))
    return values, amax


@triton.jit
def _store_row(codes_ptr, codes, columns, BLOCK: tl.constexpr):  # noqa: N803
    column = tl.arange(0, BLOCK)
    tl.store(codes_ptr + tl.program_id(0).to(tl.int64) * columns + column, codes, mask=column < columns)


@triton.jit
def _e4m3_bytes(values):
    """float32 within -448..448 to E4M3, half to even, as bytes; the same on every device and in the interpreter.

    Triton's own cast needs compute capability 8.9, and its interpreter forgets the carry into the exponent.
    """
    magnitude = tl.abs(values)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 8 * (127 - 7)  # 3 of 23 mantissa bits, another bias
    subnormal = (magnitude + 2.0**14).to(tl.int32, bitcast=True) - 0x46800000  # ulps of 2^14 are the steps, 2^-9
    code = tl.where(magnitude < 2.0**-6, subnormal, normal)
    code = tl.where(values != values, 0x7F, code)  # NaN alone differs from itself
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def fp8_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    stride,
    columns,
    LARGEST: tl.constexpr,  # noqa: N803
    SMALLEST_SCALE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One token to E4M3; `stride` and `columns` count elements of x and of a row."""
    values, amax = _load_row(x_ptr, stride, columns, BLOCK)
    scale = tl.maximum(tl.div_rn(amax, LARGEST), SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    scaled = tl.div_rn(values, tl.broadcast_to(scale, (BLOCK,)))
    scaled = tl.clamp(scaled, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    _store_row(codes_ptr, _e4m3_bytes(scaled), columns, BLOCK)
    tl.store(scale_ptr + tl.program_id(0), scale)


@triton.jit
def int8_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    stride,
    columns,
    LARGEST: tl.constexpr,  # noqa: N803
    SMALLEST: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One token to INT8; `stride` and `columns` count elements of x and of a row."""
    values, amax = _load_row(x_ptr, stride, columns, BLOCK)
    inverse = tl.div_rn(LARGEST, tl.maximum(amax, SMALLEST, propagate_nan=tl.PropagateNan.ALL))
    rounded = (values * inverse + ROUNDER) - ROUNDER
    rounded = tl.where(amax == amax, rounded, 0.0)  # NaN is in the scale, and no integer
    _store_row(codes_ptr, rounded.to(tl.int8), columns, BLOCK)
    tl.store(scale_ptr + tl.program_id(0), tl.div_rn(amax, LARGEST))


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [M, K], and scales, float32 [M, 1], of float32, bfloat16 or float16 [M, K]."""
    return _launch(fp8_kernel, x, torch.float8_e4m3fn, LARGEST=E4M3_MAX, SMALLEST_SCALE=SMALLEST_TOKEN_SCALE)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 [M, K], and scales, float32 [M, 1], of float32, bfloat16 or float16 [M, K]."""
    return _launch(int8_kernel, x, torch.int8, LARGEST=float(INT8_MAX), SMALLEST=SMALLEST_INT8_AMAX)


def _launch(kernel, x: Tensor, dtype: torch.dtype, **constants: float) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes, scale = x.new_empty(rows, columns, dtype=dtype), x.new_empty(rows, 1, dtype=torch.float32)
    if codes.numel():
        block = triton.next_power_of_2(columns)
        warps = min(max(block // (WARP * ELEMENTS_PER_THREAD), 1), MOST_WARPS)
        # A fused multiply-add would round INT8 codes once where `activation.py` rounds twice.
        options = {"num_warps": warps, "enable_fp_fusion": False}
        kernel[(rows,)](
            x,
            codes.view(torch.uint8) if dtype.is_floating_point else codes,
            scale,
            x.stride(0),
            columns,
            **constants,
            BLOCK=block,
            **options,
        )
    return codes, scale
