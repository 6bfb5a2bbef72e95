"""Whether recorded inputs prove that one choice has a smaller error than another.

Rows of one prompt resemble each other, so that they are one observation together: the errors of all its rows are added,
and a gain counts only if it exceeds its standard error over the prompts; somewhat more, if there are few. What a single
prompt shows may not hold for others, however often its rows repeat it: only a large gain counts then, one that outliers
of the model itself give. Statistics of earlier versions do not know the prompts of rows: each row is one observation,
and the gain must be larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowGroups", "row_groups"]

#: The part of the error that a gain must be if all rows may come from one prompt.
LARGE_GAIN = 0.5
#: Standard errors that a gain must exceed over rows that may resemble each other.
ROWS_BAR = 3.0


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Recorded rows in groups, each of which is one observation.

    Attributes:
        numbers: the group of each row, from 0, int64 [rows]
        count: the number of groups
        bar: standard errors that a gain must exceed
        least_gain: the part of the error that a gain must be
    """

    numbers: Tensor
    count: int
    bar: float
    least_gain: float = 0.0

    def sums(self, errors: Tensor) -> Tensor:
        """Errors by group, float64 [..., groups], of errors by row [..., rows]."""
        sums = torch.zeros(*errors.shape[:-1], self.count, dtype=torch.float64)
        return sums.index_add_(-1, self.numbers, errors.double())

    def is_proven(self, before: Tensor, after: Tensor) -> bool:
        """Whether errors by group, both float64 [groups], fell by more than chance makes them fall."""
        if self.count < 2:
            return False
        gains = before - after
        standard_error = float(gains.std()) / math.sqrt(self.count)
        least = max(self.least_gain * float(before.mean()), self.bar * standard_error)
        return float(gains.mean()) > least

    def proven_choice(self, errors: Tensor) -> int:
        """The choice with the smallest error, or the first one if no other is proven to be better.

        What the best choice gains is judged on each group with the choice that is best on all others.

        Args:
            errors: squared error of each choice for each row, [choices, rows]
        """
        by_group = self.sums(errors)
        total = by_group.sum(1)
        elsewhere = (total[:, None] - by_group).argmin(0)
        after = by_group[elsewhere, torch.arange(self.count)]
        return int(total.argmin()) if self.is_proven(by_group[0], after) else 0


def row_groups(runs: Tensor | None, rows: int) -> RowGroups:
    """The groups of recorded rows: by prompt, by denoising step of the only prompt, or each row if neither is known.

    Args:
        runs: prompt and step of each row, int64 [rows, 2]; None if they were not recorded
        rows: the number of rows
    """
    if runs is None:
        return RowGroups(torch.arange(rows), rows, ROWS_BAR)
    prompts, numbers = runs[:, 0].unique(return_inverse=True)  # type: ignore[no-untyped-call]  # torch's
    if len(prompts) > 1:
        return RowGroups(numbers, len(prompts), _bar(len(prompts)))
    steps, numbers = runs[:, 1].unique(return_inverse=True)  # type: ignore[no-untyped-call]  # torch's
    return RowGroups(numbers, len(steps), _bar(len(steps)), LARGE_GAIN)


def _bar(groups: int) -> float:
    """Standard errors that a gain must exceed: 1, or more where a few groups tell the standard error badly."""
    return 1 + 1 / max(1, groups - 1)
