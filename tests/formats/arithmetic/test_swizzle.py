from __future__ import annotations

import pytest
import torch

from omni_convert.formats.arithmetic.swizzle import padded_scale_shape, swizzle_scales, unswizzle_scales


@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (130, 5), (256, 12), (127, 8), (384, 3)])
def test_every_scale_lies_where_the_definition_says(shape: tuple[int, int]) -> None:
    rows, columns = shape
    scales = torch.randint(0, 256, shape, dtype=torch.uint8)
    padded_rows, padded_columns = padded_scale_shape(rows, columns)
    expected = torch.zeros(padded_rows * padded_columns, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * (padded_columns // 4) + c // 4
            expected[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = scales[r, c]
    swizzled = swizzle_scales(scales)
    assert swizzled.shape == (padded_rows, padded_columns)
    assert torch.equal(swizzled.flatten(), expected)
    assert torch.equal(unswizzle_scales(swizzled, rows, columns), scales)
    assert torch.equal(unswizzle_scales(swizzled.flatten(), rows, columns), scales)


def test_dtypes_of_one_byte_survive() -> None:
    scales = torch.rand(8, 8).to(torch.float8_e4m3fn)
    swizzled = swizzle_scales(scales)
    assert swizzled.dtype is torch.float8_e4m3fn
    assert torch.equal(unswizzle_scales(swizzled, 8, 8).float(), scales.float())
