"""Sums of squares: close to the real ones, and the same bits however the rows arrive."""

from __future__ import annotations

import pytest
import torch

from omni_convert.formats.statistics import square_sums as module
from omni_convert.formats.statistics.square_sums import carry, mean_squares, square_sums


def values(rows: int = 5000, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e3, 1e6, 0.0])[:width]
    return torch.randn(rows, width, generator=generator) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_they_are_the_mean_squares_of_channels_of_any_magnitude(dtype: torch.dtype) -> None:
    recorded = values().clamp(-60000, 60000).to(dtype)
    expected = recorded.double().square().mean(0)
    torch.testing.assert_close(mean_squares(square_sums(recorded), 5000).double(), expected, rtol=1e-5, atol=0)


def test_they_are_known_numbers() -> None:
    sums = square_sums(torch.tensor([[16.0, 0.5, 2.0**24], [16.0, 0.0, 2.0**30]]))
    assert sums.tolist() == [[2, 0, 2**41], [0, 2**32, 0]]  # 512 = 2 * 2^8; 1/4 = 2^32 * 2^-34; 2^24 is the largest
    assert mean_squares(sums, 2).tolist() == [256.0, 0.125, 2.0**48]


@pytest.mark.parametrize("tile", [1, 64, 1 << 20])
def test_tiles_and_order_do_not_matter(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = values()
    expected = square_sums(recorded)
    monkeypatch.setattr(module, "CPU_TILE", tile)
    assert torch.equal(square_sums(recorded.flip(0)), expected)
    parts = [square_sums(part) for part in recorded.split([1, 999, 4000])]
    assert torch.equal(carry(torch.stack(parts).sum(0)), expected)
    assert bool((expected >= 0).all())
    assert int(expected[1].max()) < 1 << 42
