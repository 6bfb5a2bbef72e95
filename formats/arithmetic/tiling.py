"""Quantizing in tiles that stay in cache.

Every step of a quantizer is a pass over memory, so a whole weight at a time would run at the speed of memory, once per
step. A tile must not be too small either: each step costs microseconds of Python, during which no other thread of a
conversion can run Python, and torch splits a step among its own threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omni_convert.formats.rows import TILE_ELEMENTS

__all__ = ["CACHED_ELEMENTS", "quantize_in_tiles"]

#: Elements of a tile for arithmetic of so many steps that only a core's own cache is fast enough.
CACHED_ELEMENTS = 1 << 18

# On an accelerator a launch costs more than a cache miss.
ACCELERATOR_TILE_ELEMENTS = 1 << 26


def quantize_in_tiles(
    rows: Tensor, quantize_tile: Callable[[Tensor], dict[str, Tensor]], elements: int = TILE_ELEMENTS
) -> dict[str, Tensor]:
    """Applies a function to tiles of whole rows of [rows, in], and joins the tensors that it returns by row.

    Args:
        rows: of the weight
        quantize_tile: the function
        elements: of a tile on a CPU
    """
    if rows.device.type != "cpu":
        elements = ACCELERATOR_TILE_ELEMENTS
    parts = [quantize_tile(tile) for tile in torch.split(rows, max(1, elements // max(1, rows.shape[1])))]
    if len(parts) == 1:
        return parts[0]
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
