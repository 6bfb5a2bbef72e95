"""Bins, percentiles and clips against values computed one by one."""

from __future__ import annotations

import math

import pytest
import torch

from omni_convert.formats.arithmetic.float8 import round_to_e4m3
from omni_convert.formats.statistics.histogram import (
    BINS,
    count_floats,
    count_words,
    fold_codes,
    mse_clip,
    percentile,
    upper_edges,
)


def histogram_of(values: torch.Tensor) -> torch.Tensor:
    return fold_codes(count_floats(values.float()))


def brute_force_clip(values: torch.Tensor, quantize: str, largest: float, fractions: torch.Tensor) -> float:
    amax = float(values.abs().max())
    errors = []
    for fraction in fractions.tolist():
        scale = amax * fraction / largest
        if quantize == "e4m3":
            rounded = round_to_e4m3(values / scale).float() * scale
        else:
            rounded = (values / scale).round().clamp(-127, 127) * scale
        errors.append(float((rounded - values).double().square().sum()))
    return amax * fractions[errors.index(min(errors))].item()


@pytest.mark.parametrize(
    ("value", "position"),
    [
        (0.0, 0),
        (-0.0, 0),
        (2.0**-41, 1),
        (-(2.0**-40), 2),
        (2.0**-40 * (1 + 1 / 16), 3),
        (1.0, 2 + 40 * 16),
        (-1.99, 2 + 40 * 16 + 15),
        (2.0**24 * 0.99, BINS - 2),
        (2.0**24, BINS - 1),
        (3e38, BINS - 1),
    ],
)
def test_a_value_lies_in_the_bin_of_its_octave(value: float, position: int) -> None:
    histogram = histogram_of(torch.tensor([value]))
    assert histogram.shape == (BINS,)
    assert histogram.nonzero().flatten().tolist() == [position]
    edges = upper_edges()
    assert abs(value) <= float(edges[position])
    if position > 1:
        assert abs(value) >= float(edges[position - 1])


def test_packed_bfloat16_counts_like_float32() -> None:
    every_value = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    packed = count_words(every_value.view(torch.int64))
    assert torch.equal(packed, count_floats(every_value.float()))
    assert int(packed.sum()) == 65536


@pytest.mark.parametrize("percent", [0.5, 50.0, 99.0, 99.9, 100.0])
def test_a_percentile_covers_its_share_and_no_more_than_a_bin_beyond(percent: float) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    amax = float(values.abs().max())
    found = percentile(histogram_of(values), percent, amax)
    assert (values.abs() <= found).sum() >= values.numel() * percent / 100
    exact = float(values.abs().sort().values[math.ceil(values.numel() * percent / 100) - 1])
    assert exact <= found <= exact * (1 + 1 / 16)
    assert found <= amax


def test_a_percentile_of_zeros_is_zero() -> None:
    histogram = histogram_of(torch.tensor([0.0] * 99 + [5.0]))
    assert percentile(histogram, 99.0, 5.0) == 0.0
    assert percentile(histogram, 99.5, 5.0) == 5.0


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_the_int8_clip_is_as_good_as_that_of_the_values_themselves(scale: float) -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).pow(3) * scale
    amax = float(values.abs().max())

    def error(clip: float) -> float:
        step = clip / 127
        return float(((values / step).round().clamp(-127, 127) * step - values).double().square().sum())

    fractions = 2.0 ** (-torch.arange(97) / 16)
    best = error(brute_force_clip(values, "int8", 127, fractions))
    found = error(mse_clip(histogram_of(values), amax, 127))
    assert found <= best * 1.02
    assert found < error(amax) * 0.9


def test_the_e4m3_clip_is_as_good_as_that_of_the_values_themselves() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(50_000, generator=generator)
    amax = float(values.abs().max())

    def error(clip: float) -> float:
        step = clip / 448
        return float((round_to_e4m3(values / step).float() * step - values).double().square().sum())

    fractions = 2.0 ** (-torch.arange(97) / 16)
    found = mse_clip(histogram_of(values), amax, 448)
    assert error(found) <= error(brute_force_clip(values, "e4m3", 448, fractions)) * 1.02
    assert error(found) <= error(amax)


def test_grids_with_block_scales_and_zeros_are_not_clipped() -> None:
    values = torch.randn(1000)
    assert mse_clip(histogram_of(values), 3.5, 2688) == 3.5
    assert mse_clip(histogram_of(torch.zeros(8)), 0.0, 448) == 0.0


def test_the_clip_never_exceeds_the_largest_magnitude() -> None:
    for amax in (1.0, 1.03, 1.9, 2.0**-42, 2.0**25):
        assert mse_clip(histogram_of(torch.tensor([amax])), amax, 448) <= amax
        assert mse_clip(histogram_of(torch.tensor([amax])), amax, 127) <= amax
