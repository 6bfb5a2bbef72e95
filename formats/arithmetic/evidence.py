"""Whether recorded inputs prove that one choice has a smaller error than another.

Rows of one prompt resemble each other, so that they are one observation together: the errors of all its rows are added,
and a gain counts only if it exceeds its standard error over the prompts; somewhat more, if there are few. With a single
prompt its denoising steps take their place, and with statistics of earlier versions, which do not know the prompts of
rows, each row; both resemble each other too, so that three standard errors are asked for. The best of several choices
must gain much besides if it was fitted to a single prompt: as much as only outliers give, which belong to the model and
not to the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowGroups", "row_groups"]

#: Standard errors that a gain must exceed over rows or steps, which may resemble each other.
STRICT_BAR = 3.0
#: The part of the error that a choice must gain that was fitted to one prompt.
LARGE_GAIN = 0.5


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Recorded rows in groups, each of which is one observation.

    Attributes:
        numbers: the group of each row, from 0, int64 [rows]
        count: the number of groups
        bar: standard errors that a gain must exceed
        least_gain: the part of the error that a choice which was fitted to the rows must gain
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
        return float(gains.mean()) > self.bar * float(gains.std()) / math.sqrt(self.count)

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
        is_enough = float(after.sum()) < (1 - self.least_gain) * float(total[0])
        return int(total.argmin()) if is_enough and self.is_proven(by_group[0], after) else 0


def row_groups(runs: Tensor | None, rows: int) -> RowGroups:
    """The groups of recorded rows: by prompt, by denoising step of the only prompt, or each row if neither is known.

    Args:
        runs: prompt and step of each row, int64 [rows, 2]; None if they were not recorded
        rows: the number of rows
    """
    if runs is None:
        return RowGroups(torch.arange(rows), rows, STRICT_BAR)
    prompts, numbers = runs[:, 0].unique(return_inverse=True)  # type: ignore[no-untyped-call]  # torch's
    if len(prompts) > 1:
        return RowGroups(numbers, len(prompts), _bar(len(prompts)))
    steps, numbers = runs[:, 1].unique(return_inverse=True)  # type: ignore[no-untyped-call]  # torch's
    return RowGroups(numbers, len(steps), STRICT_BAR, LARGE_GAIN)


def _bar(groups: int) -> float:
    """Standard errors that a gain must exceed: 1, or more where a few groups tell the standard error badly."""
    return 1 + 1 / max(1, groups - 1)
