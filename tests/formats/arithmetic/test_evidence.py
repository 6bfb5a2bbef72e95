"""A choice is taken only if prompts agree on it; many rows of one prompt are one observation."""

from __future__ import annotations

import torch

from omni_convert.formats.arithmetic.evidence import row_groups


def runs(prompts: list[int], steps: list[int]) -> torch.Tensor:
    return torch.tensor([prompts, steps]).T


def test_rows_are_grouped_by_prompt_and_those_of_one_prompt_by_step() -> None:
    groups = row_groups(runs([7, 3, 7, 3], [0, 1, 2, 3]), 4)
    assert (groups.count, groups.numbers.tolist()) == (2, [1, 0, 1, 0])
    steps = row_groups(runs([7, 7, 7, 7], [0, 4, 4, 2]), 4)
    assert (steps.count, steps.numbers.tolist()) == (3, [0, 2, 2, 1])
    unknown = row_groups(None, 4)
    assert unknown.count == 4
    assert steps.least_gain > groups.least_gain == 0
    assert unknown.bar == steps.bar > groups.bar > row_groups(runs(list(range(9)), [0] * 9), 9).bar > 1


def test_a_gain_must_exceed_its_standard_error() -> None:
    groups, before = row_groups(runs(list(range(4)), [0] * 4), 4), torch.full((4,), 10.0)
    assert groups.is_proven(before, before - torch.tensor([1.0, 2.0, 1.0, 2.0]))
    assert not groups.is_proven(before, before - torch.tensor([9.0, -3.0, -2.0, 1.0]))
    assert not groups.is_proven(before, before)
    assert not row_groups(runs([5], [0]), 1).is_proven(torch.ones(1), torch.zeros(1))


def test_two_prompts_must_agree_more_than_many() -> None:
    before = torch.tensor([10.0, 10.0])
    after = before - torch.tensor([4.0, 1.0])  # a mean of 2.5 with a standard error of 1.5
    assert not row_groups(runs([1, 2], [0, 0]), 2).is_proven(before, after)
    assert row_groups(runs(list(range(8)), [0] * 8), 8).is_proven(before.repeat(4), after.repeat(4))


def test_what_is_fitted_to_one_prompt_must_gain_much() -> None:
    groups, ones = row_groups(runs([5] * 4, [0, 1, 2, 3]), 4), torch.ones(4)
    assert groups.proven_choice(torch.stack([ones, 0.6 * ones])) == 0
    assert groups.proven_choice(torch.stack([ones, 0.4 * ones])) == 1
    assert groups.is_proven(ones, 0.6 * ones)


def test_a_choice_that_only_its_own_prompt_supports_is_not_taken() -> None:
    """Each of four choices halves the error of one prompt and raises the others: the best of them gains by chance."""
    errors = torch.full((5, 4), 1.1)
    errors[0] = 1.0
    for prompt in range(4):
        errors[prompt + 1, prompt] = 0.5
    groups = row_groups(runs(list(range(4)), [0] * 4), 4)
    assert float(errors.sum(1).min()) < float(errors[0].sum())
    assert groups.proven_choice(errors) == 0


def test_a_choice_that_helps_every_prompt_is_taken() -> None:
    errors = torch.tensor([[1.0, 2.0, 1.5, 1.0], [0.9, 1.8, 1.4, 0.9], [0.8, 1.7, 1.3, 0.8]])
    assert row_groups(runs([1, 1, 2, 3], [0] * 4), 4).proven_choice(errors) == 2
