"""Signed scales of codes around zero: number ≈ scale * value, where the codes stand for a fixed set of values.

A search has three steps. First, each group gets a scale by least squares, from a few guesses. The block's factor and
the codes of the scales follow from these. Then rounds try the codes around and fit the factor again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.groups import (
    Groups,
    round_to_half,
    safe_inverse,
    select,
    smallest,
    sum_positions,
)

__all__ = ["IntegerValues", "ScaledCodes", "TableValues", "Values", "fit_one_scale", "fit_scaled_blocks"]


class Values(ABC):
    """The values that the codes of a type stand for."""

    @abstractmethod
    def nearest(self, numbers: Tensor, out: Tensor) -> Tensor:
        """The value nearest to each number, written into `out`, which may not be `numbers`."""

    @abstractmethod
    def codes(self, values: Tensor) -> Tensor:
        """The codes of values, integers in float32 that are not negative."""

    @abstractmethod
    def of_codes(self, codes: Tensor) -> Tensor:
        """The values of codes uint8, float32."""


@dataclass(frozen=True)
class IntegerValues(Values):
    """All integers of a range."""

    lowest: int
    highest: int

    def nearest(self, numbers: Tensor, out: Tensor) -> Tensor:
        return torch.round(numbers, out=out).clamp_(self.lowest, self.highest)

    def codes(self, values: Tensor) -> Tensor:
        return values - self.lowest

    def of_codes(self, codes: Tensor) -> Tensor:
        return codes.float() + self.lowest


@dataclass(frozen=True)
class TableValues(Values):
    """Ascending integers. A number half way between two of them takes the larger."""

    table: tuple[int, ...]

    def nearest(self, numbers: Tensor, out: Tensor) -> Tensor:
        # The middle of two integers is a multiple of 1/2, so the nearest value is constant between such multiples.
        halves = torch.arange(2 * self.table[0], 2 * self.table[-1] + 1)
        middles = torch.tensor([low + high for low, high in pairwise(self.table)])
        values = self._values(numbers)[torch.bucketize(halves, middles, right=True).to(numbers.device)]
        torch.mul(numbers, 2, out=out).sub_(2 * self.table[0]).clamp_(0, len(values) - 1)
        return _looked_up(values, out)

    def codes(self, values: Tensor) -> Tensor:
        codes = torch.zeros(self.table[-1] - self.table[0] + 1, device=values.device)
        codes[torch.tensor(self.table) - self.table[0]] = torch.arange(len(self.table), dtype=torch.float32).to(codes)
        return _looked_up(codes, values.sub_(self.table[0]))

    def of_codes(self, codes: Tensor) -> Tensor:
        return _looked_up(self._values(codes), codes.float())

    def _values(self, like: Tensor) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device=like.device)


def _looked_up(entries: Tensor, numbers: Tensor) -> Tensor:
    """Replaces numbers by the entries at their integer parts; NaN becomes any entry."""
    index = numbers.to(torch.int32).clamp_(0, len(entries) - 1).flatten()
    return torch.index_select(entries, 0, index, out=numbers.view(-1)).view_as(numbers)


@dataclass(frozen=True)
class ScaledCodes:
    """Blocks as they are stored; number = factor * scale * value.

    Attributes:
        factor: FP16 values in float32 [blocks]
        scales: integers in float32 [groups, blocks]
        values: float32 [positions, groups, blocks]
    """

    factor: Tensor
    scales: Tensor
    values: Tensor


def _fit_scales(groups: Groups, values: Values, starts: Sequence[float]) -> Tensor:
    """A scale of each group [groups, blocks] by least squares, from the best of some guesses.

    Args:
        starts: values, perhaps beyond the ends, at which a guess puts the number of the largest magnitude
    """
    low, high = groups.values.amin(dim=0), groups.values.amax(dim=0)
    inverse_largest = safe_inverse(torch.where(-low > high, low, high))
    scales, gains = [], []
    for start in starts:
        by_number, squares = _moments(groups, _nearest(groups, values, inverse_largest * start))
        scale = by_number * safe_inverse(squares)
        scales.append(scale)
        gains.append(scale * by_number)
    return select(torch.stack(scales), torch.stack(gains).max(dim=0).indices)


def fit_scaled_blocks(
    groups: Groups, values: Values, lowest_scale: int, starts: Sequence[float], rounds: Sequence[Sequence[int]]
) -> ScaledCodes:
    """Searches what to store for blocks whose groups' scales are codes themselves.

    Args:
        lowest_scale: the codes of scales go from there to one below its opposite
        starts: values, perhaps beyond the ends, at which a guess puts the number of the largest magnitude
        rounds: offsets from the scales' codes to try in each round
    """
    scale = _fit_scales(groups, values, starts)
    low, high = scale.amin(dim=0), scale.amax(dim=0)
    factor = round_to_half(torch.where(-low > high, low, high) / lowest_scale)
    scales = scale.mul_(safe_inverse(factor)).round_().clamp_(lowest_scale, -lowest_scale - 1)
    for offsets in rounds:
        if len(offsets) > 1:
            scales = _search_codes(groups, values, factor, scales, lowest_scale, offsets)
        factor = _fit_factor(groups, values, factor, scales)
    return ScaledCodes(factor, scales, _nearest(groups, values, safe_inverse(factor * scales)))


def fit_one_scale(groups: Groups, values: Values, starts: Sequence[float], repeats: int) -> tuple[Tensor, Tensor]:
    """An FP16 scale of each group in float32 [groups, blocks], and the values [positions, groups, blocks].

    Args:
        starts: as for `fit_scaled_blocks`
        repeats: how often the scale is fitted to the values, and they to it
    """
    scale = round_to_half(_fit_scales(groups, values, starts))
    for _ in range(repeats):
        by_number, squares = _moments(groups, _nearest(groups, values, safe_inverse(scale)))
        fitted = round_to_half(by_number * safe_inverse(squares))
        scale = torch.where(squares == 0, scale, fitted)  # keeps an infinite scale, which the caller has to see
    return scale, _nearest(groups, values, safe_inverse(scale))


def _nearest(groups: Groups, values: Values, inverse: Tensor) -> Tensor:
    """The values nearest to the numbers times an inverse scale, in the second buffer."""
    scaled, nearest, _ = groups.scratch
    return values.nearest(torch.mul(groups.values, inverse, out=scaled), nearest)


def _moments(groups: Groups, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of products of values and numbers, and of the values' squares, each [groups, blocks].

    Args:
        nearest: the second buffer; overwritten
    """
    products = groups.scratch[0]
    by_number = sum_positions(torch.mul(nearest, groups.weighted, out=products)).clone()
    return by_number, sum_positions(groups.weigh(nearest.mul_(nearest))).clone()


def _search_codes(
    groups: Groups, values: Values, factor: Tensor, scales: Tensor, lowest_scale: int, offsets: Sequence[int]
) -> Tensor:
    """The codes of scales with the smallest error among those around the present ones."""
    around = torch.tensor(offsets, dtype=torch.float32, device=scales.device)[:, None, None]
    tried = (scales + around).clamp_(lowest_scale, -lowest_scale - 1)  # [offsets, groups, blocks]
    step = tried * factor
    inverse = safe_inverse(step)
    step.mul_(step)
    errors = torch.empty_like(tried)
    scaled, nearest, _ = groups.scratch
    for i in range(len(tried)):
        torch.mul(groups.values, inverse[i], out=scaled)
        scaled.sub_(values.nearest(scaled, nearest))
        torch.mul(sum_positions(groups.weigh(scaled.mul_(scaled))), step[i], out=errors[i])
    errors = torch.where(step == 0, groups.squares(), errors)
    return select(tried, smallest(errors))


def _fit_factor(groups: Groups, values: Values, factor: Tensor, scales: Tensor) -> Tensor:
    """The factor of each block by least squares, for the values that the present one gives."""
    by_number, squares = _moments(groups, _nearest(groups, values, safe_inverse(factor * scales)))
    squares = sum_positions(squares.mul_(scales).mul_(scales))
    fitted = round_to_half(sum_positions(by_number.mul_(scales)) * safe_inverse(squares))
    return torch.where(squares == 0, factor, fitted)
