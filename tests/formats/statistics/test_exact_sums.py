"""Sums that are the same in any order, over numbers of very different sizes."""

from __future__ import annotations

import itertools

import torch

from omni_convert.formats.statistics.exact_sums import add_sums, exact_sums, sums_to_floats


def numbers(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, generator=generator, dtype=torch.float64).mul(12).exp2()


def test_the_order_of_adding_does_not_matter() -> None:
    parts = [exact_sums(numbers(seed)) for seed in range(3)]
    whole = add_sums(parts)
    for first, second, third in itertools.permutations(parts):
        assert torch.equal(add_sums([add_sums([first, second]), third]), whole)
    torch.testing.assert_close(sums_to_floats(whole), sum(numbers(seed) for seed in range(3)), rtol=1e-12, atol=2e-18)


def test_the_fine_part_is_carried() -> None:
    almost_one = exact_sums(torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    total = add_sums([almost_one] * 5)
    assert total[:, 0].tolist() == [4, (1 << 60) - 5 * (1 << 7)]


def test_numbers_outside_the_range_are_clamped() -> None:
    assert sums_to_floats(exact_sums(torch.tensor([-1.0, 1e30]))).tolist() == [0.0, 2.0**48]
