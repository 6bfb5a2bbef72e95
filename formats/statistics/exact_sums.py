"""Sums of non-negative numbers of any size that do not depend on the order of adding, so that parts merge exactly.

Each number is rounded to a multiple of 2^-60 and split in two whole numbers, which integers add exactly.

    sums I64 [2, n]   sum = sums[0] + 2^-60 * sums[1], where 0 <= sums[1] < 2^60

Numbers above 2^48 count as 2^48.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["add_sums", "exact_sums", "sums_to_floats"]

FINE_BITS = 60
LARGEST = 2.0**48


def exact_sums(values: Tensor) -> Tensor:
    """Numbers as sums of one part each; float64 [n] to int64 [2, n]."""
    clamped = values.double().clamp(0.0, LARGEST)
    whole = clamped.floor()
    # A float64 below 1 times 2^60 is below 2^60, also after rounding: the largest one is 1 - 2^-53.
    return torch.stack([whole.long(), ((clamped - whole) * 2.0**FINE_BITS).long()])


def add_sums(parts: Iterable[Tensor]) -> Tensor:
    """Adds sums, at least one, each int64 [2, n]."""
    first, *others = parts
    total = first
    for part in others:
        fine = total[1] + part[1]  # below 2^61
        total = torch.stack([total[0] + part[0] + (fine >> FINE_BITS), fine & ((1 << FINE_BITS) - 1)])
    return total


def sums_to_floats(sums: Tensor) -> Tensor:
    """The numbers that sums stand for, float64 [n]."""
    return sums[0].double() + sums[1].double() * 2.0**-FINE_BITS
