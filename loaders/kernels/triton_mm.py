"""A GEMM in Triton that decodes packed weights tile by tile, in registers: none ever lies in memory as bfloat16.

A code times the scale of its block has few enough bits for bfloat16, so that weights are exact in `tl.dot`; products
are accumulated in float32. Not run on hardware: tests run the kernel in Triton's interpreter, and compile it for each
architecture that may run it; its tiles are chosen by reasoning, not by measurement.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (Triton gives the arguments of a kernel their types, and its decorators have none.)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an optional dependency
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

__all__ = ["TILES", "Tile", "decode_mm_kernel", "multiply"]


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how: rows of x, rows of the weight, elements along K in one step."""

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


@triton.jit
def _e2m1(packed):
    """Values of packed codes, two a byte, even elements in low nibbles: uint8 [N, K / 2] to float32 [N, K]."""
    codes = tl.interleave(packed & 0xF, packed >> 4).to(tl.int16)
    # As a float16 with the same sign, exponent and mantissa fields, 2^(15 - 1) too small; subnormals are too.
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
def _load(ptr, row, column, rows, columns):
    """A tile of a contiguous matrix, zeros outside of it."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(ptr + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0)


@triton.jit
def decode_mm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    unit_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    columns,
    weight_width,
    scale_width,
    IS_E2M1: tl.constexpr,  # noqa: N803  # constants of a kernel are in capitals
    IS_E8M0: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    IN_CACHE: tl.constexpr,  # noqa: N803
    IS_INTERPRETED: tl.constexpr,  # noqa: N803
):
    """One tile of out [rows, outputs]; see `multiply`. `unit_ptr` and `bias_ptr` may be None."""
    tile_rows, tile_outputs = tl.cdiv(rows, ROWS), tl.cdiv(outputs, OUTPUTS)
    program = tl.program_id(0)
    i, j = tl.swizzle2d(program // tile_outputs, program % tile_outputs, tile_rows, tile_outputs, IN_CACHE)
    row, output = i * ROWS + tl.arange(0, ROWS), j * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, columns, STEP):
        x = _load(x_ptr, row, start + tl.arange(0, STEP), rows, columns)
        if IS_E2M1:
            packed = _load(weight_ptr, output, start // 2 + tl.arange(0, STEP // 2), outputs, weight_width)
            weight = _e2m1(packed)
        else:
            weight = _e4m3(_load(weight_ptr, output, start + tl.arange(0, STEP), outputs, weight_width))
        scale = _load(scale_ptr, output, start // BLOCK + tl.arange(0, STEP // BLOCK), outputs, scale_width)
        scale = _e8m0(scale) if IS_E8M0 else _e4m3(scale)
        weight = weight.reshape(OUTPUTS, STEP // BLOCK, BLOCK) * scale[:, :, None]
        weight = tl.trans(weight.reshape(OUTPUTS, STEP).to(tl.bfloat16))
        if IS_INTERPRETED:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, weight, total)
    if unit_ptr is not None:
        total *= tl.load(unit_ptr)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < rows) & (output[None, :] < outputs)
    target = out_ptr + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor, unit: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies x with the decoded weight, transposed.

    Args:
        x: bfloat16 [M, K]
        weight: E2M1 codes, uint8 [out, ceil(K / 2)], or E4M3, float8_e4m3fn [out, K]
        scale: of blocks of 32, E8M0, uint8 [out, ceil(K / 32)], or of 16, float8_e4m3fn [out, ceil(K / 16)]
        unit: what the result is multiplied with, float32 [], or None
        bias: [out] or None
        dtype: of the result

    Returns:
        [M, out]
    """
    out = x.new_empty(len(x), len(weight), dtype=dtype)
    if not out.numel():
        return out
    tile = next(tile for most_rows, tile in TILES if len(x) <= most_rows)
    is_e8m0 = scale.dtype is torch.uint8
    decode_mm_kernel[(triton.cdiv(len(x), tile.rows) * triton.cdiv(len(weight), tile.outputs),)](
        x.contiguous(),
        weight.contiguous().view(torch.uint8),
        scale.contiguous().view(torch.uint8),
        unit,
        bias if bias is None else bias.contiguous(),
        out,
        len(x),
        len(weight),
        x.shape[1],
        weight.shape[1],
        scale.shape[1],
        IS_E2M1=weight.dtype is torch.uint8,
        IS_E8M0=is_e8m0,
        BLOCK=32 if is_e8m0 else 16,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        STEP=tile.step,
        IN_CACHE=TILE_ROWS_IN_CACHE,
        IS_INTERPRETED=triton.knobs.runtime.interpret,  # its dot takes the bits of bfloat16 for integers
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
