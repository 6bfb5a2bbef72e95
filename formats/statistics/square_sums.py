"""Sums of squares by channel that do not depend on the order of adding, so that parts merge exactly.

Each square is rounded to a multiple of 2^-34 and split in two: a multiple of 2^8, and a rest that is smaller. Sums of
either are exact in float64 for up to 4096 rows, and in 64-bit integers for any number of tokens.

    sums I64 [2, in]   sum of squares = 2^8 * sums[0] + 2^-34 * sums[1], where 0 <= sums[1] < 2^42

Magnitudes above 2^24 count as 2^24, where the last bin of the histogram begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["carry", "mean_squares", "square_sums"]

COARSE, FINE = 8, -34
LARGEST = 2.0**48
ROWS = 4096
# Elements that are squared at a time on a CPU: in float64 they stay in its cache.
CPU_TILE = 1 << 16
# Adding this number and taking it away again rounds to a multiple of 2^exponent: float64 has 53 bits.
TO_COARSE, TO_FINE = (1.5 * 2.0 ** (52 + exponent) for exponent in (COARSE, FINE))


def square_sums(values: Tensor) -> Tensor:
    """Sums the squares of values, any float dtype [rows, in], over the rows; int64 [2, in]."""
    sums = torch.zeros(2, values.shape[1], dtype=torch.int64, device=values.device)
    step = ROWS if values.device.type != "cpu" else min(ROWS, max(1, CPU_TILE // values.shape[1]))
    for rows in torch.split(values, step):
        squares = rows.double().square_().clamp_(max=LARGEST)
        coarse = torch.add(squares, TO_COARSE).sub_(TO_COARSE)
        fine = squares.sub_(coarse).add_(TO_FINE).sub_(TO_FINE)
        sums += torch.stack([coarse.sum(0) * 2.0**-COARSE, fine.sum(0) * 2.0**-FINE]).long()
    return carry(sums)


def carry(sums: Tensor) -> Tensor:
    """The one form of added sums, int64 [2, in], in which the second is not negative and below 2^42."""
    carried = sums[1] >> COARSE - FINE
    return torch.stack([sums[0] + carried, sums[1] - (carried << COARSE - FINE)])


def mean_squares(sums: Tensor, rows: int) -> Tensor:
    """The mean square of each channel over a number of rows, float32 [in]."""
    total = sums[0].double() * 2.0**COARSE + sums[1].double() * 2.0**FINE
    return (total / rows).float()
