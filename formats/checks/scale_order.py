"""Whether block scales lie in the order in which they are read, told from the file alone.

The magnitude of a block, scale x RMS of its elements, varies less from block to block than its factors do: where the
largest element of a block is an outlier, its scale is large and the other elements are small. Scales in another order
lose that, and lose what rows and columns have in common as well; so of two orders the right one is the smoother, once
means of rows and columns are taken away. (Not as neighbours: other orders bring rows of one magnitude together.)
(Block maxima of the elements alone say nothing: they are near the top of the grid whatever the scales are.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.swizzle import padded_scale_shape, swizzle_scales, unswizzle_scales

__all__ = ["LEAST_SPREAD", "MIN_BLOCKS", "WIDEST", "other_order", "roughness", "scales_are_scrambled", "smoother_order"]

#: With fewer blocks than this, chance could decide.
MIN_BLOCKS = 256
# The other order must be smoother by this, and by so many standard errors.
MARGIN = 0.08
DEVIATIONS = 5.0
#: Standard deviation of log2 of scales that tell something: of weights that were drawn evenly from an interval, as
#: those of untrained models, it is 0.1, and their order hardly shows; of normal ones it is 0.34.
LEAST_SPREAD = 0.15
#: Binades to either side of the median that count.
WIDEST = 8.0


def roughness(magnitude: Tensor) -> float:
    """Variance that is left when rows and columns have given theirs.

    Args:
        magnitude: log2 of the blocks' magnitudes, float32 [rows, blocks]; NaN where a block is all zeros
    """
    middle = float(magnitude.nanmedian())  # the scale of a block of zeros may be anything
    near = magnitude.clamp(middle - WIDEST, middle + WIDEST)
    rest = near - near.nanmean(1, keepdim=True)
    rest = rest - rest.nanmean(0, keepdim=True)
    return float(rest.square_().nanmean())


def other_order(scales: Tensor, *, swizzled: bool) -> Tensor | None:
    """These scales, had the file been read in the other order; None if its shape would not allow that.

    Args:
        scales: as they were read, one byte each [rows, blocks]
        swizzled: they were taken for swizzled ones in the file
    """
    rows, blocks = scales.shape
    if padded_scale_shape(rows, blocks) != (rows, blocks):
        return None
    return swizzle_scales(scales) if swizzled else unswizzle_scales(scales, rows, blocks)


def smoother_order(elements: Tensor, scales: Tensor, other: Tensor) -> bool:
    """Whether the other order is the right one.

    Args:
        elements: log2 RMS of each block's elements, NaN for zeros; float32 [rows, blocks]
        scales: log2 of the scales as they were read
        other: log2 of the scales in the other order
    """
    count = elements.numel()
    if count < MIN_BLOCKS:
        return False
    margin = max(MARGIN, DEVIATIONS / math.sqrt(count))
    limit = (1 - margin) * roughness(elements + scales)
    return roughness(elements + other) < limit


def scales_are_scrambled(elements: Tensor, scales: Tensor) -> bool:
    """Whether the scales fit their blocks no better than scales drawn by lot; arguments as of `smoother_order`."""
    count = elements.numel()
    if count < 4 * MIN_BLOCKS or float(scales.std()) < LEAST_SPREAD:
        return False
    lot = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    drawn = scales.flatten()[lot].view_as(scales)
    return roughness(elements + scales) > 0.97 * roughness(elements + drawn)
