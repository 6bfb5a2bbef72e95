"""Activation quantization per token and per tensor in Triton: each row is read once, its codes are written once.

The arithmetic is that of `formats/arithmetic/input_codes.py`, bit for bit: true division, rounding half to even, NaN
kept. Not run on hardware: tests run these kernels in Triton's interpreter, and compile them for each architecture that
may run them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Triton gives the arguments of a kernel their types, and its decorators have none.)

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an optional dependency
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from omni_convert.formats.arithmetic.input_codes import INT8_MAX, SMALLEST_INT8_AMAX, SMALLEST_TOKEN_SCALE
from omni_convert.formats.schemes.fp8 import E4M3_MAX

__all__ = [
    "divide",
    "e4m3",
    "fp8_kernel",
    "has_type",
    "int8_kernel",
    "largest_magnitude",
    "quantize_fp8",
    "quantize_fp8_static",
    "quantize_int8",
    "static_kernel",
]

# Elements of a row that a thread holds in registers; with fewer, short rows leave threads of a warp without work.
ELEMENTS_PER_THREAD = 32
WARP = 32
MOST_WARPS = 16
STATIC_WARPS = 4
#: Compute capability of the first GPUs with the type E4M3.
E4M3_CAPABILITY = (8, 9)
# Added and taken away again, it leaves a float32 below 2^22 without fraction, rounded half to even.
ROUNDER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def largest_magnitude(values, AXIS: tl.constexpr):  # noqa: N803  # constants of a kernel are in capitals
    """Amax of float32 along an axis, NaN if any value is: the bits of magnitudes are ordered as they are, NaN last."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def divide(values, scale, HAS_FMA: tl.constexpr):  # noqa: N803
    """Correctly rounded quotients by a positive scale that many values share; broadcasts.

    A reciprocal and two corrections, as the division instruction's own fast path has them, but for each scale once and
    without its branch: division alone would hold the kernel below the speed of memory. In the interpreter there is no
    fused multiply-add, and so a division.
    """
    if HAS_FMA:
        inverse = tl.div_rn(1.0, scale)
        finite = tl.where(scale == float("inf"), 0.0, scale)  # else zero times infinity would come in
        product = values * inverse
        quotient = tl.fma(-tl.fma(product, finite, -values), inverse, product)  # in this order, -0 stays -0
    else:
        quotient = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    return quotient


@triton.jit
def _load_row(x_ptr, stride, columns, BLOCK: tl.constexpr):  # noqa: N803
    """The values of this program's row in float32, zeros beyond its end, and their amax, NaN if any value is."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x_ptr + row * stride + column, mask=column < columns, other=0.0).to(tl.float32)
    return values, largest_magnitude(values, 0)


@triton.jit
def _store_row(codes_ptr, codes, columns, BLOCK: tl.constexpr):  # noqa: N803
    column = tl.arange(0, BLOCK)
    tl.store(codes_ptr + tl.program_id(0).to(tl.int64) * columns + column, codes, mask=column < columns)


@triton.jit
def e4m3(values, LARGEST: tl.constexpr, HAS_E4M3: tl.constexpr):  # noqa: N803
    """float32 to E4M3, half to even, saturating, NaN kept: where the GPU has the type in it, else as bytes.

    The cast is one instruction for two values and saturates by itself. Without it, a dozen of integer arithmetic for
    each: in Triton's interpreter too, whose own cast forgets the carry into the exponent.
    """
    if HAS_E4M3:
        codes = values.to(tl.float8e4nv)
    else:
        values = tl.clamp(values, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        magnitude = tl.abs(values)
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 8 * (127 - 7)  # 3 of 23 mantissa bits, another bias
        subnormal = (magnitude + 2.0**14).to(tl.int32, bitcast=True) - 0x46800000  # ulps of 2^14 are the steps, 2^-9
        code = tl.where(magnitude < 2.0**-6, subnormal, normal)
        code = tl.where(values != values, 0x7F, code)  # NaN alone differs from itself
        sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = (code | sign).to(tl.uint8)
    return codes


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
    HAS_E4M3: tl.constexpr,  # noqa: N803
):
    """One token to E4M3; `stride` and `columns` count elements of x and of a row."""
    values, amax = _load_row(x_ptr, stride, columns, BLOCK)
    scale = tl.maximum(tl.div_rn(amax, LARGEST), SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    _store_row(codes_ptr, e4m3(divide(values, scale, HAS_E4M3), LARGEST, HAS_E4M3), columns, BLOCK)
    tl.store(scale_ptr + tl.program_id(0), scale)


@triton.jit
def static_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    count,
    LARGEST: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    HAS_E4M3: tl.constexpr,  # noqa: N803
):
    """`count` elements that lie in a row to E4M3 for one scale."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.float32)
    codes = e4m3(values * tl.div_rn(1.0, tl.load(scale_ptr)), LARGEST, HAS_E4M3)
    tl.store(codes_ptr + place, codes, mask=place < count)


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
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    target = codes if has_type(x) else codes.view(torch.uint8)
    scale = _launch(fp8_kernel, x, target, LARGEST=E4M3_MAX, SMALLEST_SCALE=SMALLEST_TOKEN_SCALE, HAS_E4M3=has_type(x))
    return codes, scale


def quantize_fp8_static(x: Tensor, input_scale: Tensor) -> Tensor:
    """Codes, float8_e4m3fn [M, K], of float32, bfloat16 or float16 [M, K] for one scale, float32 [] or [1]."""
    x = x.contiguous()
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    if codes.numel():
        block = WARP * ELEMENTS_PER_THREAD * STATIC_WARPS
        static_kernel[(triton.cdiv(x.numel(), block),)](
            x,
            codes if has_type(x) else codes.view(torch.uint8),
            input_scale,
            x.numel(),
            LARGEST=E4M3_MAX,
            BLOCK=block,
            HAS_E4M3=has_type(x),
            num_warps=STATIC_WARPS,
        )
    return codes


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 [M, K], and scales, float32 [M, 1], of float32, bfloat16 or float16 [M, K]."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, _launch(int8_kernel, x, codes, LARGEST=float(INT8_MAX), SMALLEST=SMALLEST_INT8_AMAX)


def has_type(x: Tensor, capability: tuple[int, int] = E4M3_CAPABILITY) -> bool:
    """Whether the device of a tensor has a small float type, by default E4M3."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= capability


def _launch(kernel, x: Tensor, codes: Tensor, **constants: float) -> Tensor:
    """Fills in the codes of each row; returns the scales, float32 [M, 1]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    if codes.numel():
        block = triton.next_power_of_2(columns)
        warps = min(max(block // (WARP * ELEMENTS_PER_THREAD), 1), MOST_WARPS)
        # A fused multiply-add would round INT8 codes once where `input_codes.py` rounds twice.
        options = {"num_warps": warps, "enable_fp_fusion": False}
        kernel[(rows,)](x, codes, scale, x.stride(0), columns, **constants, BLOCK=block, **options)
    return scale
