"""Scales and minima of codes that count up from a minimum: number ≈ scale * code - minimum, both of them not negative.

A search has three steps. First, each group gets a scale and a minimum by least squares, from a few guesses. The block's
two factors and the codes of scales and minima follow from these. Then rounds try the codes around and fit the factors
anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

__all__ = ["AffineCodes", "AffineGrid", "Offsets", "fit_affine_blocks", "fit_one_affine"]

# Two equations are singular if their determinant is a smaller part than this of the product of its diagonal.
SINGULAR = 1e-6
#: Codes to try around those of the scales, and around those of the minima.
Offsets = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class AffineGrid:
    """The codes that a type can store, from 0 up.

    Attributes:
        largest: largest code of a number
        largest_scale: largest code of a scale or a minimum
    """

    largest: int
    largest_scale: int


@dataclass(frozen=True)
class AffineCodes:
    """Blocks as they are stored; number = factor * scale * code - minimum_factor * minimum.

    Attributes:
        factor, minimum_factor: FP16 values in float32 [blocks]
        scales, minima: integers in float32 [groups, blocks]
        codes: integers in float32 [positions, groups, blocks]
    """

    factor: Tensor
    minimum_factor: Tensor
    scales: Tensor
    minima: Tensor
    codes: Tensor


def _fit_affine(
    groups: Groups, largest: int, starts: Sequence[float], *, any_minimum: bool = False
) -> tuple[Tensor, Tensor]:
    """A scale and a minimum of each group [groups, blocks] by least squares, from the best of some guesses."""
    low = groups.values.amin(dim=0)
    if not any_minimum:
        low = low.clamp_(max=0)
    inverse_range = safe_inverse(groups.values.amax(dim=0) - low)
    gains, fits = [], []
    for start in starts:
        inverse = inverse_range * (largest + start)
        codes = _round_affine(groups, largest, inverse, -low * inverse)
        scale, minimum, gain = _least_squares(groups, codes, any_minimum=any_minimum)
        fits.append(torch.stack([scale, minimum]))
        gains.append(gain)
    best = torch.stack(gains).max(dim=0).indices
    scale, minimum = select(torch.stack(fits), best.expand(2, *best.shape))
    return scale, minimum


def fit_affine_blocks(
    groups: Groups, grid: AffineGrid, starts: Sequence[float], rounds: Sequence[Offsets]
) -> AffineCodes:
    """Searches what to store for blocks whose groups' scales and minima are codes themselves.

    Args:
        starts: guesses, as the distance between the code of a group's largest number and the largest code
        rounds: offsets to try in each round
    """
    scale, minimum = _fit_affine(groups, grid.largest, starts)
    factor = round_to_half(scale.amax(dim=0) / grid.largest_scale)
    minimum_factor = round_to_half(minimum.amax(dim=0) / grid.largest_scale)
    scales = scale.mul_(safe_inverse(factor)).round_().clamp_(1, grid.largest_scale)
    minima = minimum.mul_(safe_inverse(minimum_factor)).round_().clamp_(0, grid.largest_scale)
    for offsets in rounds:
        if len(offsets[0]) * len(offsets[1]) > 1:
            scales, minima = _search_codes(groups, grid, factor, minimum_factor, scales, minima, offsets)
        factor, minimum_factor = _fit_factors(groups, grid, factor, minimum_factor, scales, minima)
    scales = torch.where(factor == 0, 0.0, scales)  # blocks of zeros are bytes of zeros
    codes = _codes_of(groups, grid, factor, minimum_factor, scales, minima)
    return AffineCodes(factor, minimum_factor, scales, minima, codes)


def fit_one_affine(
    groups: Groups, largest: int, starts: Sequence[float], repeats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minima of any sign, FP16 values in float32 [groups, blocks], and codes [positions, groups, blocks].

    Args:
        largest: largest code of a number
        starts: as for `fit_affine_blocks`
        repeats: how often scale and minimum are fitted to the codes, and they to them
    """
    scale, minimum = map(round_to_half, _fit_affine(groups, largest, starts, any_minimum=True))
    for _ in range(repeats):
        codes = _round_to_stored(groups, largest, scale, minimum)
        scale, minimum, _ = _least_squares(groups, codes, any_minimum=True)
        scale, minimum = round_to_half(scale), round_to_half(minimum)
    return scale, minimum, _round_to_stored(groups, largest, scale, minimum)


def _round_to_stored(groups: Groups, largest: int, scale: Tensor, minimum: Tensor) -> Tensor:
    inverse = safe_inverse(scale)
    return _round_affine(groups, largest, inverse, minimum * inverse)


def _round_affine(groups: Groups, largest: int, inverse: Tensor, offset: Tensor) -> Tensor:
    """Codes of the numbers, in the first buffer; a code is number * inverse + offset."""
    codes = torch.mul(groups.values, inverse, out=groups.scratch[0])
    return codes.add_(offset).round_().clamp_(0, largest)


def _codes_of(
    groups: Groups, grid: AffineGrid, factor: Tensor, minimum_factor: Tensor, scales: Tensor, minima: Tensor
) -> Tensor:
    return _round_to_stored(groups, grid.largest, factor * scales, minimum_factor * minima)


def _moments(groups: Groups, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of codes, of their squares, and of their products with the numbers, each [groups, blocks].

    Args:
        codes: the first buffer; overwritten
    """
    _, products, _ = groups.scratch
    by_number = sum_positions(torch.mul(codes, groups.weighted, out=products)).clone()
    if groups.weights is None:
        total = sum_positions(products.copy_(codes)).clone()
        squares = sum_positions(codes.mul_(codes)).clone()
    else:
        codes.mul_(torch.mul(codes, groups.weights, out=products))
        total, squares = sum_positions(products).clone(), sum_positions(codes).clone()
    return total, squares, by_number


def _least_squares(groups: Groups, codes: Tensor, *, any_minimum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum of each group for given codes, and by how much they lower its squared error."""
    weight, number = groups.sums
    total, squares, by_number = _moments(groups, codes)
    product = weight * squares
    determinant = product - total * total
    inverse = safe_inverse(torch.where(determinant > SINGULAR * product, determinant, 0.0))
    scale = (weight * by_number - number * total) * inverse
    minimum = (total * by_number - squares * number) * inverse
    # Equal codes, which equal numbers have, do not determine the scale.
    minimum = torch.where(inverse == 0, -number * safe_inverse(weight), minimum)
    if not any_minimum:
        scale = torch.where(minimum < 0, by_number * safe_inverse(squares), scale)
        minimum.clamp_(min=0)
    return scale.clamp_(min=0), minimum, scale * by_number - minimum * number


def _search_codes(
    groups: Groups,
    grid: AffineGrid,
    factor: Tensor,
    minimum_factor: Tensor,
    scales: Tensor,
    minima: Tensor,
    offsets: Offsets,
) -> tuple[Tensor, Tensor]:
    """The codes of scales and minima with the smallest error among those around the present ones.

    The minima tried with a scale lie around the one that leaves the middle of the codes where it was.
    """
    around = [torch.tensor(steps, dtype=torch.float32, device=scales.device) for steps in offsets]
    tried = (scales + around[0][:, None, None]).clamp_(1, grid.largest_scale)  # [scales, groups, blocks]
    shift = (tried - scales) * (factor * safe_inverse(minimum_factor) * (grid.largest / 2))
    centre = (minima + shift).round_()[:, None]
    lows = (centre + around[1][:, None, None]).clamp_(0, grid.largest_scale)  # [scales, minima, groups, blocks]
    step = tried * factor
    inverse = safe_inverse(step)
    starts = lows * minimum_factor * inverse[:, None]
    step.mul_(step)
    errors = torch.empty_like(lows)
    scaled, codes, rest = groups.scratch
    for i in range(len(tried)):
        torch.mul(groups.values, inverse[i], out=scaled)
        for j in range(len(around[1])):
            torch.add(scaled, starts[i, j], out=rest)
            rest.sub_(torch.round(rest, out=codes).clamp_(0, grid.largest))
            torch.mul(sum_positions(groups.weigh(rest.mul_(rest))), step[i], out=errors[i, j])
    best = smallest(errors.flatten(0, 1))
    chosen = best // len(around[1])
    return select(tried, chosen), select(lows.flatten(0, 1), best)


def _fit_factors(
    groups: Groups, grid: AffineGrid, factor: Tensor, minimum_factor: Tensor, scales: Tensor, minima: Tensor
) -> tuple[Tensor, Tensor]:
    """The two factors of each block by least squares, for the codes that the present ones give."""
    codes = _codes_of(groups, grid, factor, minimum_factor, scales, minima)
    total, squares, by_number = _moments(groups, codes)
    weight, number = groups.sums
    a = sum_positions(squares.mul_(scales).mul_(scales))
    b = sum_positions(total.mul_(scales).mul_(minima))
    c = sum_positions((weight * minima).mul_(minima))
    by_scale = sum_positions(by_number.mul_(scales))
    by_minimum = sum_positions(number * minima)
    determinant = a * c - b * b
    inverse = safe_inverse(determinant)
    fitted = (by_scale * c - by_minimum * b) * inverse
    fitted_minimum = (by_scale * b - by_minimum * a) * inverse
    alone = torch.where(c == 0, by_scale * safe_inverse(a), factor)
    is_solved = (determinant > SINGULAR * a * c) & (fitted > 0) & (fitted_minimum >= 0)
    factor = torch.where(is_solved, fitted, alone)
    return round_to_half(factor), round_to_half(torch.where(is_solved, fitted_minimum, minimum_factor))
