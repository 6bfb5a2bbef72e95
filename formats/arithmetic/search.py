"""Steps that searches share: the nearest of a few levels, and the best of some attempts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LevelTable", "best_attempt", "is_greater", "nearest_level"]

# Cells in an interval of length 1.
CELLS = 2048
# Rounding puts a number into the cell beside its own only if it is nearer to that than this part of a cell.
MARGIN = 1 / 8


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level to each value, the lower one of two that are as near.

    Args:
        values: float32 [..., values]
        levels: sorted, float32 [levels] for all values, or [..., levels] for each group of them

    Returns:
        int64 [..., values]
    """
    above = torch.searchsorted(levels, values.contiguous())
    low, high = (above - 1).clamp_(min=0), above.clamp_(max=levels.shape[-1] - 1)
    is_above = (values - _at(levels, high)).abs() < (values - _at(levels, low)).abs()
    return torch.where(is_above, high, low)


@dataclass(frozen=True, eq=False)
class LevelTable:
    """Sorted levels from -1 to 1, and the nearest to each of many numbers.

    Searching the levels for each number would take ten times as long as two look-ups in a fine grid of cells. Bounds
    between levels are more than two cells apart, so that a cell holds one of them at most.

    Attributes:
        levels: sorted, float32 [levels]
        bounds: the bound that a cell may hold, or the next one or infinity, float32 [cells]
        codes_beside: the codes below and above that bound, uint8 [2 * cells]
        levels_beside: their levels, float32 [2 * cells]
        centred: the level nearest to the centre of a cell, float32 [cells]
    """

    levels: Tensor
    bounds: Tensor
    codes_beside: Tensor
    levels_beside: Tensor
    centred: Tensor

    @classmethod
    def of(cls, levels: Tensor, bounds: Tensor, device: torch.device) -> LevelTable:
        """The table of some levels, on a device.

        Args:
            levels: sorted, float32 [levels]
            bounds: the largest numbers to which the lower of two levels is the nearest, float32 [levels - 1]
            device: where the numbers will be
        """
        centres = cls.cell_centres()
        below = torch.bucketize(centres - (0.5 + MARGIN) / CELLS, bounds)
        beside = torch.stack([below, (below + 1).clamp_(max=len(levels) - 1)], dim=1).flatten()
        of_cells = torch.cat([bounds, torch.tensor([torch.inf])])[below]
        centred = levels[torch.bucketize(centres, bounds)]
        parts = (levels, of_cells, beside.to(torch.uint8), levels[beside], centred)
        return cls(*(part.to(device) for part in parts))

    @staticmethod
    def cell_centres() -> Tensor:
        """The number in the middle of each cell, float32 [cells]."""
        return (torch.arange(2 * CELLS + 1) + 0.5) / CELLS - 1

    @staticmethod
    def cells(values: Tensor) -> Tensor:
        """The numbers of the cells that hold these values, int32 [values]; NaN becomes 0."""
        return (values * CELLS).add_(CELLS).clamp_(0, 2 * CELLS).to(torch.int32).clamp_(min=0).flatten()

    def codes(self, values: Tensor) -> Tensor:
        """Codes of the nearest levels, uint8 of the same shape; a number on a bound takes the lower one."""
        return self.codes_beside.index_select(0, self._sides(values)).view(values.shape)

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest levels, float32 of the same shape; a number on a bound takes the lower one."""
        return self.levels_beside.index_select(0, self._sides(values)).view(values.shape)

    def nearly_nearest(self, values: Tensor) -> Tensor:
        """The nearest levels or, within a cell of a bound, perhaps the next; float32 of the same shape."""
        return self.centred.index_select(0, self.cells(values)).view(values.shape)

    def _sides(self, values: Tensor) -> Tensor:
        """Where the two entries of all cells have those of the values, int32 [values]."""
        cells = self.cells(values)
        is_above = is_greater(values.reshape(-1), self.bounds.index_select(0, cells))
        return cells.mul_(2).add_(is_above.to(torch.int32))


def is_greater(values: Tensor, others: Tensor) -> Tensor:
    """1.0 where values are greater than others, else 0.0: on a CPU in a third of the time of a comparison.

    Args:
        values: float32
        others: likewise; overwritten
    """
    return torch.sub(values, others, out=others).sign_().clamp_(min=0)


def best_attempt(attempts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The tensors of the attempt with the smallest error, for each entry of the error; the first of equal ones.

    Args:
        attempts: at least one; of each the error, then tensors whose leading dimensions are those of the error
    """
    remaining = iter(attempts)
    best = next(remaining)
    for tried in remaining:  # one at a time: each is as large as a tile
        is_better = tried[0] < best[0]
        best = tuple(
            torch.where(is_better.view(*is_better.shape, *[1] * (new.dim() - is_better.dim())), new, old)
            for new, old in zip(tried, best, strict=True)
        )
    return best


def _at(levels: Tensor, indices: Tensor) -> Tensor:
    return levels[indices] if levels.dim() == 1 else levels.gather(-1, indices)
