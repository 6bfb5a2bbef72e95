"""Steps that searches share: the nearest of a few levels, and the best of some attempts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["best_attempt", "nearest_level"]


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
