"""The nearest of a few levels, and the best of some attempts."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.search import LevelTable, best_attempt, nearest_level

LEVELS = torch.tensor([-2.0, 0.0, 1.0])
VALUES = torch.tensor([[-9.0, -1.0, -0.9, 0.5, 0.6, 9.0]])


def test_nearest_level_is_the_lower_of_two_as_near() -> None:
    assert nearest_level(VALUES, LEVELS).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_each_group_may_have_levels_of_its_own() -> None:
    levels = torch.stack([LEVELS, LEVELS + 8])
    assert nearest_level(VALUES.expand(2, -1), levels).tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 2]]


def hard_numbers(bounds: Tensor) -> Tensor:
    """Numbers everywhere, and the 64 floats around each bound."""
    near = (bounds.view(torch.int32)[:, None] + torch.arange(-32, 32, dtype=torch.int32)).view(torch.float32)
    return torch.cat([torch.linspace(-1.5, 1.5, 20001), near.flatten()])


def test_a_table_knows_the_nearest_level_as_a_search_does() -> None:
    levels = torch.tensor([-0.9, -0.25, 0.1, 0.4, 1.0])
    bounds = (levels[1:] + levels[:-1]) / 2
    table, numbers = LevelTable.of(levels, bounds, torch.device("cpu")), hard_numbers(bounds)
    expected = torch.bucketize(numbers, bounds)
    assert table.codes(numbers).equal(expected.to(torch.uint8))
    assert table.nearest(numbers[None]).flatten().equal(levels[expected])
    wrong = table.nearly_nearest(numbers) != levels[expected]
    assert float((numbers[wrong, None] - bounds).abs().amin(dim=1).max()) < 1 / 2048
    assert table.codes(torch.tensor([torch.nan, torch.inf, -torch.inf])).tolist()[1:] == [4, 0]


def test_the_best_attempt_is_chosen_per_entry_of_the_error() -> None:
    first = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([[1.0], [2.0], [3.0]])
    second = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([[-1.0], [-2.0], [-3.0]])
    error, values = best_attempt(iter([first, second]))
    assert error.tolist() == [0.5, 1.0, 1.0]
    assert values.flatten().tolist() == [-1.0, 2.0, 3.0]
