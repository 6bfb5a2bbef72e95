"""The order in which cuBLAS reads block scales ("swizzled", "blocked", SWIZZLE_32_4_4).

A scale matrix [R, C] is padded with zeros to multiples of (128, 4) and cut into tiles of 128 x 4, row of tiles by row
of tiles; inside a tile the scale (r, c) lies at position (r mod 32) * 16 + (r div 32) * 4 + c. ComfyUI's files and
`scaled_mm` want this order; every vLLM-Omni format is linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["padded_scale_shape", "swizzle_scales", "unswizzle_scales"]

TILE_ROWS = 128
TILE_COLUMNS = 4


def padded_scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """[R, C] rounded up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def swizzle_scales(scales: Tensor) -> Tensor:
    """Linear scales [R, C], of a dtype of one byte, to swizzled ones in the padded shape."""
    padded_rows, padded_columns = padded_scale_shape(*scales.shape)
    padded = torch.zeros(padded_rows, padded_columns, dtype=torch.uint8, device=scales.device)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = padded.view(-1, 4, 32, padded_columns // 4, 4)  # [tile row, r div 32, r mod 32, tile column, c]
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `swizzle_scales`: swizzled scales of the padded size, in any shape, to linear [rows, columns]."""
    padded_rows, padded_columns = padded_scale_shape(rows, columns)
    tiles = swizzled.view(torch.uint8).reshape(-1, padded_columns // 4, 32, 4, 4)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)
    return padded[:rows, :columns].contiguous().view(swizzled.dtype)
