"""Steps that searches share: the nearest of a few levels, and the better of two attempts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["better_attempt", "nearest_level"]


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


def better_attempt(best: tuple[Tensor, ...] | None, tried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Takes the tensors of the attempt with the smaller error, for each entry of the error; a tie keeps the first.

    Args:
        best: the best attempt so far, None before the first
        tried: the error, then tensors whose leading dimensions are those of the error
    """
    if best is None:
        return tried
    error, *_ = tried
    is_better = error < best[0]
    return tuple(
        torch.where(is_better.view(*error.shape, *[1] * (new.dim() - error.dim())), new, old)
        for new, old in zip(tried, best, strict=True)
    )


def _at(levels: Tensor, indices: Tensor) -> Tensor:
    return levels[indices] if levels.dim() == 1 else levels.gather(-1, indices)
