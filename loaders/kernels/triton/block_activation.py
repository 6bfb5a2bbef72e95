"""Activation quantization by blocks along K in Triton: a tile of tokens is read once, its codes are written once.

The arithmetic is that of `formats/arithmetic/input_codes.py`, bit for bit. Scales are written where the
scaled GEMM expects them: group by group for FP8; in cuBLAS's order (`formats/arithmetic/swizzle.py`), with padding, for
MXFP8 and NVFP4. Not run on hardware: tests run these kernels in Triton's interpreter, and compile them for each
architecture that may run them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Triton gives the arguments of a kernel their types, and its decorators have none.)

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an optional dependency
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from omni_convert.formats.arithmetic.float8 import E4M3_MAX
from omni_convert.formats.arithmetic.input_codes import SMALLEST_GROUP_AMAX
from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK
from omni_convert.formats.arithmetic.swizzle import padded_scale_shape
from omni_convert.loaders.kernels.triton.activation import divide, e4m3, has_type, largest_magnitude

__all__ = [
    "TILE",
    "group_kernel",
    "mxfp8_kernel",
    "nvfp4_kernel",
    "quantize_groups",
    "quantize_mxfp8",
    "quantize_nvfp4",
]

#: Tokens and columns of a tile: 32 elements for each of 4 warps' threads, a kilobyte or more of each token in a row,
#: and scales of FP8 groups fill the 32 bytes that memory writes at once.
TILE = (8, 512)
#: Compute capability of the first GPUs with the type E2M1.
E2M1_CAPABILITY = (10, 0)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _load_tile(x_ptr, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    """This program's tile in float32, zeros outside of x, and its rows and columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    address = x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32), row, column


@triton.jit
def _store_tile(ptr, codes, row, column, rows, columns):
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(ptr + row.to(tl.int64)[:, None] * columns + column[None, :], codes, mask=inside)


@triton.jit
def _store_swizzled(ptr, scale, row, first_group, rows, groups, GROUPS: tl.constexpr):  # noqa: N803
    """Scale bytes [rows, GROUPS] in tiles of 128 x 4, padded with zeros."""
    group = first_group + tl.arange(0, GROUPS)
    tile_columns = (groups + 3) // 4
    tile = (row // 128).to(tl.int64)[:, None] * tile_columns + (group // 4)[None, :]
    place = (row % 32 * 16 + row // 32 % 4 * 4)[:, None] + (group % 4)[None, :]
    scale = tl.where((row[:, None] < rows) & (group[None, :] < groups), scale, 0)
    tl.store(
        ptr + tile * 512 + place, scale.to(tl.uint8), mask=(group[None, :] < tile_columns * 4) & (row[:, None] >= 0)
    )


@triton.jit
def group_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    stride,
    rows,
    columns,
    scale_stride,
    GROUP: tl.constexpr,  # noqa: N803  # constants of a kernel are in capitals
    LARGEST: tl.constexpr,  # noqa: N803
    SMALLEST_AMAX: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    HAS_E4M3: tl.constexpr,  # noqa: N803
):
    """A tile to E4M3, a scale for each token and group; `scale_stride` counts scales from a group to the next."""
    values, row, column = _load_tile(x_ptr, stride, rows, columns, ROWS, COLUMNS)
    blocks = values.reshape(ROWS, COLUMNS // GROUP, GROUP)
    amax = largest_magnitude(blocks, 2)
    scale = tl.div_rn(tl.maximum(amax, SMALLEST_AMAX, propagate_nan=tl.PropagateNan.ALL), LARGEST)
    codes = e4m3(divide(blocks, scale[:, :, None], HAS_E4M3), LARGEST, HAS_E4M3)
    _store_tile(codes_ptr, codes.reshape(ROWS, COLUMNS), row, column, rows, columns)
    group = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    inside = (row[:, None] < rows) & (group[None, :] < tl.cdiv(columns, GROUP))
    tl.store(scale_ptr + group.to(tl.int64)[None, :] * scale_stride + row[:, None], scale, mask=inside)


@triton.jit
def mxfp8_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    stride,
    rows,
    columns,
    BLOCK: tl.constexpr,  # noqa: N803
    LARGEST: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    HAS_E4M3: tl.constexpr,  # noqa: N803
):
    """A tile to E4M3 with swizzled powers of two by the floor rule, byte 255 where a block is not finite."""
    values, row, column = _load_tile(x_ptr, stride, rows, columns, ROWS, COLUMNS)
    blocks = values.reshape(ROWS, COLUMNS // BLOCK, BLOCK)
    field = largest_magnitude(blocks, 2).to(tl.int32, bitcast=True) >> 23
    scale = tl.where(field == 255, 255, tl.maximum(field - 8, 0))  # 448 lies in the binade of 2^8
    inverse = tl.where(scale < 254, (254 - scale) << 23, 1 << 22).to(tl.float32, bitcast=True)
    codes = e4m3(blocks * inverse[:, :, None], LARGEST, HAS_E4M3)
    _store_tile(codes_ptr, codes.reshape(ROWS, COLUMNS), row, column, rows, columns)
    groups = tl.cdiv(columns, BLOCK)
    _store_swizzled(scale_ptr, scale, row, tl.program_id(1) * (COLUMNS // BLOCK), rows, groups, COLUMNS // BLOCK)


@triton.jit
def _e2m1_codes(values):
    """float32 to codes 0..15, half to even, saturating; what becomes zero loses its sign, and NaN is zero."""
    magnitude = tl.minimum(tl.abs(values), 6.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 2 * (127 - 1)  # 1 of 23 mantissa bits, another bias
    subnormal = (magnitude + 2.0**22).to(tl.int32, bitcast=True) - 0x4A800000  # ulps of 2^22 are the steps, 0.5
    code = tl.where(magnitude < 1.0, subnormal, normal)
    code = tl.where(values == values, code, 0)  # NaN alone differs from itself
    return tl.where((values < 0) & (code > 0), code | 8, code)


@triton.jit
def _packed_e2m1(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_E2M1: tl.constexpr):  # noqa: N803
    """float32 [ROWS, COLUMNS] in any shape to pairs of codes, uint8 [ROWS, COLUMNS / 2], even elements low."""
    low, high = tl.split(values.reshape(ROWS, COLUMNS // 2, 2))
    if HAS_E2M1:
        low, high = tl.where(tl.abs(low) > 0.25, low, 0.0), tl.where(tl.abs(high) > 0.25, high, 0.0)  # no -0, no NaN
        packed = tl.inline_asm_elementwise(
            "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
            "=r,f,f",
            [low, high],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        packed = _e2m1_codes(low) | (_e2m1_codes(high) << 4)
    return packed.to(tl.uint8)


@triton.jit
def nvfp4_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    unit_ptr,
    stride,
    rows,
    columns,
    BLOCK: tl.constexpr,  # noqa: N803
    LARGEST: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    HAS_E4M3: tl.constexpr,  # noqa: N803
    HAS_E2M1: tl.constexpr,  # noqa: N803
):
    """A tile to packed E2M1, even elements in low nibbles, with swizzled E4M3 scales over `unit_ptr`, float32 []."""
    values, row, _ = _load_tile(x_ptr, stride, rows, columns, ROWS, COLUMNS)
    unit = tl.load(unit_ptr)
    blocks = values.reshape(ROWS, COLUMNS // BLOCK, BLOCK)
    amax = largest_magnitude(blocks, 2)
    ratio = tl.div_rn(amax, tl.broadcast_to(6.0 * unit, amax.shape))
    ratio = tl.maximum(tl.where(ratio == 0, 1.0, ratio), 2.0**-9, propagate_nan=tl.PropagateNan.ALL)
    scale = e4m3(ratio, LARGEST, HAS_E4M3)
    code = scale.to(tl.uint8, bitcast=True)
    whole = (code.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**8  # scales have no sign
    whole = tl.where(ratio == ratio, whole, ratio) * unit
    codes = _packed_e2m1(divide(blocks, whole[:, :, None], HAS_E4M3), ROWS, COLUMNS, HAS_E2M1)
    half = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    _store_tile(codes_ptr, codes, row, half, rows, columns // 2)
    groups = columns // BLOCK
    _store_swizzled(scale_ptr, code, row, tl.program_id(1) * (COLUMNS // BLOCK), rows, groups, COLUMNS // BLOCK)


def quantize_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Computes `fused_activation.fp8_per_group_op`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    groups = triton.cdiv(columns, group_size)
    codes = x.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(groups, rows, dtype=torch.float32)
    constants = {"GROUP": group_size, "LARGEST": E4M3_MAX, "SMALLEST_AMAX": SMALLEST_GROUP_AMAX}
    if codes.numel():
        group_kernel[_grid(rows, columns)](
            x,
            codes if has_type(x) else codes.view(torch.uint8),
            scale,
            x.stride(0),
            rows,
            columns,
            rows,
            **constants,
            **_tile(x),
        )
    return codes, scale.t()


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `fused_activation.mxfp8_swizzled_op`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = x.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    padded_rows, padded_groups = padded_scale_shape(rows, triton.cdiv(columns, MX_BLOCK))
    scale = x.new_empty(padded_rows * padded_groups, dtype=torch.uint8)
    if codes.numel():
        mxfp8_kernel[_grid(padded_rows, padded_groups * MX_BLOCK)](
            x,
            codes if has_type(x) else codes.view(torch.uint8),
            scale,
            x.stride(0),
            rows,
            columns,
            BLOCK=MX_BLOCK,
            LARGEST=E4M3_MAX,
            **_tile(x),
        )
    return codes, scale


def quantize_nvfp4(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `fused_activation.nvfp4_swizzled_op`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = x.new_empty(rows, columns // 2, dtype=torch.uint8)
    padded_rows, padded_groups = padded_scale_shape(rows, columns // NVFP4_BLOCK)
    scale = x.new_empty(padded_rows * padded_groups, dtype=torch.float8_e4m3fn)
    if codes.numel():
        nvfp4_kernel[_grid(padded_rows, padded_groups * NVFP4_BLOCK)](
            x,
            codes,
            scale.view(torch.uint8),
            input_scale,
            x.stride(0),
            rows,
            columns,
            BLOCK=NVFP4_BLOCK,
            LARGEST=E4M3_MAX,
            HAS_E2M1=has_type(x, E2M1_CAPABILITY),
            **_tile(x),
        )
    return codes, scale


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, TILE[0]), triton.cdiv(columns, TILE[1])


def _tile(x: Tensor) -> dict[str, object]:
    return {"ROWS": TILE[0], "COLUMNS": TILE[1], "HAS_E4M3": has_type(x), **OPTIONS}
