"""Histograms of magnitudes on fixed bins; percentiles and the best clip are computed from them.

The bins are the same for every layer and every run, so histograms of any two runs add up exactly. Each octave from
2^-40 to 2^24 is divided into 16 equal parts: a bin's number is the exponent and the first four mantissa bits of a
float32, or of a bfloat16, which is its upper half.

    bin 0                  zero and magnitudes below 2^-130
    bin 1                  below 2^-40
    bins 2 to 1025         2^-40 up to 2^24
    bin 1026               2^24 and above
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.float8 import E4M3_MAX, round_to_e4m3
from omni_convert.formats.arithmetic.input_codes import INT8_MAX

__all__ = ["BINS", "CODES", "count_floats", "count_words", "fold_codes", "mse_clip", "percentile", "upper_edges"]

MANTISSA_BITS = 4
CODES = 1 << (8 + MANTISSA_BITS)
FLOAT32_SHIFT = 23 - MANTISSA_BITS
FLOAT32_BIAS = 127
FIRST_CODE = (FLOAT32_BIAS - 40) << MANTISSA_BITS
LAST_CODE = (FLOAT32_BIAS + 24) << MANTISSA_BITS
BINS = LAST_CODE - FIRST_CODE + 3

BFLOAT16_SHIFT = 7 - MANTISSA_BITS
#: Mask of the codes of the four bfloat16 values in a 64-bit word, after a shift to the right.
PACKED_CODES = 0x0FFF_0FFF_0FFF_0FFF

#: Magnitudes that represent a bin in estimates of the error; near the clip a bin is at least four int8 steps wide.
POINTS_PER_BIN = 16
#: Clips to try: the largest magnitude times 2^(-k/16), down to 1/64 of it.
CLIP_FRACTIONS = tuple(2.0 ** (-k / 16) for k in range(97))


def count_words(words: Tensor) -> Tensor:
    """Counts the codes of bfloat16 values that are packed in 64-bit words.

    Args:
        words: int64, any shape, four values each

    Returns:
        number of values by code (exponent and four mantissa bits), int64 [4096]
    """
    codes = words >> BFLOAT16_SHIFT
    codes &= PACKED_CODES
    return torch.bincount(codes.view(torch.int16).flatten(), minlength=CODES)


def count_floats(values: Tensor) -> Tensor:
    """Counts the codes of float32 values [...]; int64 [4096]."""
    codes = values.contiguous().view(torch.int32) >> FLOAT32_SHIFT
    codes &= CODES - 1
    return torch.bincount(codes.flatten(), minlength=CODES)


def fold_codes(counts: Tensor) -> Tensor:
    """Turns counts by code, int64 [4096], into counts by bin, int64 [1027]."""
    return torch.cat(
        [
            counts[:1],
            counts[1:FIRST_CODE].sum(0, keepdim=True),
            counts[FIRST_CODE:LAST_CODE],
            counts[LAST_CODE:].sum(0, keepdim=True),
        ]
    )


@lru_cache(maxsize=1)
def upper_edges() -> Tensor:
    """The magnitude at which each bin ends, float32 [1027]; infinity for the last."""
    codes = torch.arange(FIRST_CODE, LAST_CODE + 1, dtype=torch.int32)
    inner = (codes << FLOAT32_SHIFT).view(torch.float32)
    return torch.cat([torch.zeros(1), inner, torch.full((1,), math.inf)])


def percentile(histogram: Tensor, percent: float, amax: float) -> float:
    """The upper edge of the bin that holds a percentile, but at most the largest magnitude.

    Args:
        histogram: int64 [1027]
        percent: above 0, up to 100
        amax: largest magnitude that was counted
    """
    cumulative = histogram.cumsum(0)
    wanted = math.ceil(float(cumulative[-1]) * (percent / 100))
    position = int(torch.searchsorted(cumulative, max(1, wanted)))
    return min(float(upper_edges()[min(position, BINS - 1)]), amax)


def mse_clip(histogram: Tensor, amax: float, largest: float) -> float:
    """The clip at which quantizing the counted values has the least squared error.

    Args:
        histogram: int64 [1027]
        amax: largest magnitude that was counted
        largest: largest value of the grid: 448 for E4M3, 127 for int8. Other grids have block scales, which follow
            the values, so clipping gains nothing and the result is `amax`.
    """
    if largest not in (E4M3_MAX, INT8_MAX) or amax == 0:
        return amax
    points, weights = _points(histogram, amax)
    best, least = amax, math.inf
    for fraction in CLIP_FRACTIONS:
        scale = amax * fraction / largest
        scaled = points / scale
        rounded = round_to_e4m3(scaled).float() if largest == E4M3_MAX else scaled.round_().clamp_(max=INT8_MAX)
        error = float(torch.dot(rounded.mul_(scale).sub_(points).double().square_(), weights))
        if error < least:
            best, least = amax * fraction, error
    return best


def _points(histogram: Tensor, amax: float) -> tuple[Tensor, Tensor]:
    """Magnitudes spread evenly over the occupied bins, and the number of values that each represents.

    Returns:
        float32 [points] and float64 [points]
    """
    occupied = histogram[1:].nonzero()[:, 0] + 1
    edges = upper_edges()
    lower, upper = edges[occupied - 1], edges[occupied].clamp(max=amax)
    places = (torch.arange(POINTS_PER_BIN) + 0.5) / POINTS_PER_BIN
    points = lower[:, None] + (upper - lower)[:, None] * places
    weights = histogram[occupied].double() / POINTS_PER_BIN
    return points.flatten(), weights.repeat_interleave(POINTS_PER_BIN)
