from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.rows import TILE_ELEMENTS


@pytest.mark.parametrize("rows", [0, 1, 7, 300, 1025])
def test_rows_come_back_in_order(rows: int) -> None:
    columns = TILE_ELEMENTS // 64
    matrix = torch.arange(rows)[:, None] + torch.zeros(columns)
    seen = []

    def double(tile: Tensor) -> dict[str, Tensor]:
        seen.append(len(tile))
        return {"weight": tile * 2, "weight_scale": tile.amax(dim=1)}

    joined = quantize_in_tiles(matrix, double)
    assert torch.equal(joined["weight"], matrix * 2)
    assert torch.equal(joined["weight_scale"], torch.arange(rows).float())
    assert max(seen) <= 64
    assert sum(seen) == rows


def test_rows_wider_than_a_tile_are_taken_one_by_one() -> None:
    matrix = torch.zeros(3, TILE_ELEMENTS + 1, dtype=torch.bfloat16)
    heights = quantize_in_tiles(matrix, lambda tile: {"weight": torch.tensor([len(tile)])})["weight"]
    assert heights.tolist() == [1, 1, 1]
