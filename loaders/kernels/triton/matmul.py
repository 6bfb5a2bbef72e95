"""A GEMM in Triton that decodes packed weights tile by tile, in registers: none ever lies in memory as bfloat16.

A code, and a code times the E8M0 or E4M3 scale of its block, has few enough bits for bfloat16, so that weights are
exact in `tl.dot`; products are accumulated in float32. Scales with more bits come in there: that of a group of columns
on the sum of each step, which lies within one group, that of a weight or of its rows on the whole sum. Not run on
hardware: tests run the kernel in Triton's interpreter, and compile it for each architecture that may run it; its tiles
are chosen by reasoning, not by measurement.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Triton gives the arguments of a kernel their types, and its decorators have none.)

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an optional dependency
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

__all__ = ["LONGEST_STEP", "TILES", "TILE_ROWS_IN_CACHE", "Tile", "choose_tile", "decode_mm_kernel", "multiply"]


@dataclass(frozen=True)
class Tile:
    """The work of one program: rows of x, rows of the weight, elements along K in one step."""

    rows: int
    outputs: int
    step: int
    warps: int
    stages: int


#: By the largest number of rows of x that each is for. The first, modulation and timestep layers, is about bytes of
#: weights: many programs and long steps. The last is about decoding a weight seldom: many rows to a program.
TILES: tuple[tuple[float, Tile], ...] = (
    (16, Tile(16, 32, 128, warps=4, stages=4)),
    (64, Tile(64, 64, 64, warps=4, stages=3)),
    (float("inf"), Tile(128, 128, 64, warps=8, stages=3)),
)
# Rows of tiles that run after each other share their weights in the second-level cache.
TILE_ROWS_IN_CACHE = 8
# The sum of a step takes registers beside the whole sum: with twice as many outputs, sm_100 spills.
MOST_GROUPED_OUTPUTS = 64
LONGEST_STEP = max(tile.step for _, tile in TILES)
#: How a kernel reads weights of each dtype.
CODES = {torch.uint8: "e2m1", torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.int32: "int4"}


@triton.jit
def _e2m1(packed):
    """Values of packed codes, two a byte, even elements in low nibbles: uint8 [N, K / 2] to float32 [N, K]."""
    codes = tl.interleave(packed & 0xF, packed >> 4).to(tl.int16)
    # A float16 with the same sign, exponent and mantissa fields is 2^(15 - 1) too small, subnormals included.
    return (((codes & 8) << 12) | ((codes & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**14


@triton.jit
def _e4m3(codes):
    """Values of E4M3 bytes, float32; NaN is no weight. As above, 2^(15 - 7) too small."""
    codes = codes.to(tl.int16)
    return (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**8


@triton.jit
def _e8m0(codes):
    """Powers of two, float32; 2^-127, which is subnormal, is zero."""
    return (codes.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load(ptr, row, column, columns, IS_EVEN: tl.constexpr):  # noqa: N803  # constants of a kernel are in capitals
    """A tile of rows of a contiguous matrix, zeros beyond their ends, which the tile does not reach if `IS_EVEN`."""
    place = ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(place) if IS_EVEN else tl.load(place, mask=column[None, :] < columns, other=0)


@triton.jit
def _decode_words(weight_ptr, zero_ptr, output, start, outputs, STEP: tl.constexpr, GROUP: tl.constexpr):  # noqa: N803
    """Integers of 4 bits less their zero points, int32 [STEP, OUTPUTS], of words of eight."""
    words = _load(weight_ptr, start // 8 + tl.arange(0, STEP // 8), output, outputs, True)
    codes = (words[:, None, :] >> (tl.arange(0, 8) * 4)[None, :, None]) & 0xF
    zeros = tl.load(zero_ptr + (start // GROUP) * (outputs // 8) + output // 8) >> (output % 8 * 4)
    return codes.reshape(STEP, output.shape[0]) - ((zeros & 0xF) + 1)[None, :]


@triton.jit
def _decode_rows(
    weight_ptr,
    scale_ptr,
    output,
    start,
    weight_width,
    scale_width,
    CODE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    IS_EVEN: tl.constexpr,  # noqa: N803
):
    """Codes times the scales of their blocks, float32 [OUTPUTS, STEP]; `scale_ptr` may be None."""
    if CODE == "e2m1":
        weight = _e2m1(_load(weight_ptr, output, start // 2 + tl.arange(0, STEP // 2), weight_width, IS_EVEN))
    else:
        codes = _load(weight_ptr, output, start + tl.arange(0, STEP), weight_width, IS_EVEN)
        weight = _e4m3(codes) if CODE == "e4m3" else codes.to(tl.float32)
    if scale_ptr is not None:
        scale = _load(scale_ptr, output, start // BLOCK + tl.arange(0, STEP // BLOCK), scale_width, IS_EVEN)
        scale = _e8m0(scale) if BLOCK == 32 else _e4m3(scale)
        weight = weight.reshape(output.shape[0], STEP // BLOCK, BLOCK) * scale[:, :, None]
        weight = weight.reshape(output.shape[0], STEP)
    return weight


@triton.jit
def decode_mm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    group_ptr,
    zero_ptr,
    unit_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    columns,
    weight_width,
    scale_width,
    group_row_stride,
    group_stride,
    unit_stride,
    CODE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    GROUP_ROWS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    MULTIPLE: tl.constexpr,  # noqa: N803
    IN_CACHE: tl.constexpr,  # noqa: N803
    IS_INTERPRETED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
):
    """One tile of out [rows, outputs]; see `multiply`. Pointers to scales, zero points and a bias may be None.

    CODE is e2m1, e4m3, int8 or int4; MULTIPLE, a power of two, divides `columns`; STEP divides GROUP.
    """
    tile_rows, tile_outputs = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    program = tl.program_id(0)
    i, j = tl.swizzle2d(program // tile_outputs, program % tile_outputs, tile_rows, tile_outputs, IN_CACHE)
    row, output = i * ROWS + tl.arange(0, ROWS), j * OUTPUTS + tl.arange(0, OUTPUTS)
    # Results beyond the last row are computed from other rows and not stored, which needs no masks.
    x_row, weight_row = row % rows, output % outputs
    is_even: tl.constexpr = MULTIPLE % STEP == 0
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, columns, STEP):
        x = _load(x_ptr, x_row, start + tl.arange(0, STEP), columns, is_even)
        if CODE == "int4":
            weight = _decode_words(weight_ptr, zero_ptr, weight_row, start, outputs, STEP, GROUP).to(tl.float32)
        else:
            weight = tl.trans(
                _decode_rows(
                    weight_ptr, scale_ptr, weight_row, start, weight_width, scale_width, CODE, BLOCK, STEP, is_even
                )
            )
        weight = weight.to(tl.bfloat16)
        if IS_INTERPRETED:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        if group_ptr is None:
            total = tl.dot(x, weight, total)
        else:
            place = weight_row // GROUP_ROWS * group_row_stride + start // GROUP * group_stride
            total += tl.dot(x, weight) * tl.load(group_ptr + place).to(tl.float32)[None, :]
    if unit_ptr is not None:
        total *= tl.load(unit_ptr + weight_row * unit_stride).to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
    inside = (row[:, None] < rows) & (output[None, :] < outputs)
    target = out_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    group_scale: Tensor | None,
    zero_points: Tensor | None,
    unit: Tensor | None,
    bias: Tensor | None,
    group_shape: tuple[int, int],
    outputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiplies x with the decoded weight, transposed.

    Args:
        x: bfloat16 [M, K]
        weight: E2M1 codes, uint8 [out, ceil(K / 2)]; E4M3, float8_e4m3fn [out, K]; int8 [out, K]; or integers of
            4 bits, int32 [K / 8, out]
        block_scale: of blocks of 32, E8M0, uint8 [out, ceil(K / 32)]; of 16, float8_e4m3fn [out, ceil(K / 16)]; or None
        group_scale: of groups of rows and columns, float32 or float16 [ceil(out / rows), ceil(K / columns)], or None
        zero_points: less one, of integers of 4 bits, int32 [K / columns of a group, out / 8], or None
        unit: factor of the result, float32 [], [1] or one for each row of the weight, or None
        bias: [out] or None
        group_shape: rows and columns of a group, the latter divisible by 16; columns are 0 where there is none
        outputs: rows of the weight
        dtype: of the result

    Returns:
        [M, out]
    """
    out = x.new_empty(len(x), outputs, dtype=dtype)
    if not out.numel():
        return out
    unit = None if unit is None else unit.reshape(-1).expand(outputs)
    group_strides = (0, 0) if group_scale is None else group_scale.stride()
    tile = choose_tile(len(x), group_shape[1])
    decode_mm_kernel[(triton.cdiv(len(x), tile.rows) * triton.cdiv(outputs, tile.outputs),)](
        x.contiguous(),
        _as_bytes(weight),
        None if block_scale is None else _as_bytes(block_scale),
        group_scale,
        None if zero_points is None else zero_points.contiguous(),
        unit,
        None if bias is None else bias.contiguous(),
        out,
        len(x),
        outputs,
        x.shape[1],
        weight.shape[1],
        0 if block_scale is None else block_scale.shape[1],
        *group_strides,
        0 if unit is None else unit.stride(0),
        CODE=CODES[weight.dtype],
        BLOCK=16 if block_scale is not None and block_scale.dtype is torch.float8_e4m3fn else 32,
        GROUP_ROWS=group_shape[0],
        GROUP=group_shape[1],
        MULTIPLE=gcd(x.shape[1], LONGEST_STEP),
        IN_CACHE=TILE_ROWS_IN_CACHE,
        IS_INTERPRETED=triton.knobs.runtime.interpret,  # its dot takes the bits of bfloat16 for integers
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def choose_tile(rows: int, group: int) -> Tile:
    """The tile for rows of x and columns that share a scale, 0 where that is not applied to the sum of each step."""
    tile = next(tile for most_rows, tile in TILES if rows <= most_rows)
    if not group:
        return tile
    return replace(tile, outputs=min(tile.outputs, MOST_GROUPED_OUTPUTS), step=gcd(tile.step, group))


def _as_bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor
