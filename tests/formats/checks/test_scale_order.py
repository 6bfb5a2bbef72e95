"""The order of block scales shows in the magnitudes of the blocks: of weights of any kind, and never the wrong one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.mx import split_blocks
from omni_convert.formats.checks.scale_order import other_order, scales_are_scrambled, smoother_order
from omni_convert.formats.checks.values import elements_of
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4

ROWS, COLUMNS = 256, 1024
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "independent": lambda: normal(ROWS, COLUMNS) * 0.03,
    "rows of many sizes": lambda: normal(ROWS, COLUMNS) * 0.03 * normal(ROWS, 1).exp(),
    "columns of many sizes": lambda: normal(ROWS, COLUMNS) * 0.03 * normal(1, COLUMNS).exp(),
    "low rank": lambda: normal(ROWS, 4) @ normal(4, COLUMNS) * 0.02,
    "outliers": lambda: normal(ROWS, COLUMNS) / normal(ROWS, COLUMNS).abs().clamp(min=0.05) * 0.01,
    "mostly zeros": lambda: normal(ROWS, COLUMNS) * (torch.rand(ROWS, COLUMNS, generator=GENERATOR) < 0.1),
}
FORMATS: dict[str, Format] = {
    "mxfp8": Mxfp8(search=False),
    "mxfp8 floor": Mxfp8("floor"),
    "mxfp4": Mxfp4(search=False),
    "nvfp4": Nvfp4(search=False),
}


def log_magnitudes(fmt: Format, weight: Tensor) -> tuple[Tensor, Tensor]:
    """log2 RMS of the elements of each block, and the scales."""
    tensors = fmt.quantize(weight)
    scales = tensors["weight_scale"]
    blocks = split_blocks(elements_of(fmt, tensors), COLUMNS // scales.shape[1])
    magnitude = blocks.square().mean(-1).sqrt().log2()
    return torch.where(magnitude.isfinite(), magnitude, torch.nan), scales


def log2(scales: Tensor) -> Tensor:
    return scales.float() - 127 if scales.dtype is torch.uint8 else scales.float().log2()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("method", FORMATS)
def test_the_right_order_is_told_from_the_other(kind: str, method: str) -> None:
    magnitude, scales = log_magnitudes(FORMATS[method], WEIGHTS[kind]())
    right = log2(scales)
    assert not scales_are_scrambled(magnitude, right)
    for swizzled in (False, True):
        other = other_order(scales, swizzled=swizzled)
        assert other is not None
        assert not smoother_order(magnitude, right, log2(other))
        assert smoother_order(magnitude, log2(other), right)
    lot = torch.randperm(right.numel(), generator=GENERATOR)
    assert scales_are_scrambled(magnitude, right.flatten()[lot].view_as(right))


def test_equal_scales_have_no_order() -> None:
    magnitude, scales = log_magnitudes(FORMATS["mxfp8"], torch.rand(ROWS, COLUMNS, generator=GENERATOR) + 1)
    assert not smoother_order(magnitude, log2(scales), log2(scales))
    assert not scales_are_scrambled(magnitude, log2(scales))


def test_a_padded_shape_has_no_other_order() -> None:
    assert other_order(torch.ones(100, 4, dtype=torch.uint8), swizzled=False) is None
