"""The choice: the optimum on the convex hull, within the budget, and the same for the same numbers."""

from __future__ import annotations

import itertools
import random

import pytest

from omni_convert.convert.precision.choice import Option, Point, Unit, cheapest_below, frontier, least_error

NAMES = ("four", "eight", "bf16")


def size(option: Option) -> float:
    return option.size


def units(count: int, seed: int) -> list[Unit]:
    source = random.Random(seed)
    found = []
    for number in range(count):
        weights = source.randint(1, 9) * 100
        bits = [4, 8, 16]
        errors = [source.expovariate(1.0) * weights / 4.0 ** (each / 4) for each in bits]
        sizes = [weights * each // 8 for each in bits]
        choices = tuple(Option(*each, 0.0) for each in zip(NAMES, errors, sizes, strict=True))
        found.append(Unit("transformer", (f"layer{number}",), (f"layer{number}",), weights, choices))
    return found


def every_choice(table: list[Unit]) -> list[Point]:
    return [Point(chosen) for chosen in itertools.product(*(unit.options for unit in table))]


@pytest.mark.parametrize("seed", range(8))
def test_each_point_of_the_frontier_is_the_best_of_its_size(seed: int) -> None:
    table = units(6, seed)
    choices = every_choice(table)
    points = list(frontier(table, size))
    for point in points:
        best = min(choice.error for choice in choices if choice.size <= point.size)
        assert point.error == pytest.approx(best)
        assert least_error(table, size, point.size).error == pytest.approx(best)
    assert [point.size for point in points] == sorted(point.size for point in points)


@pytest.mark.parametrize("seed", range(8))
def test_between_two_points_the_rest_of_the_budget_is_spent(seed: int) -> None:
    table = units(6, seed)
    points = list(frontier(table, size))
    for below, above in itertools.pairwise(points):
        limit = (below.size + above.size) // 2
        found = least_error(table, size, limit)
        assert found.size <= limit
        assert found.error <= below.error


def test_a_budget_that_nothing_meets() -> None:
    table = units(4, 0)
    smallest = min(choice.size for choice in every_choice(table))
    assert least_error(table, size, smallest - 1) is None
    assert least_error(table, size, smallest).size == smallest
    assert cheapest_below(table, size, -1.0) is None


def test_the_cheapest_choice_below_an_error() -> None:
    table = units(5, 3)
    points = list(frontier(table, size))
    found = cheapest_below(table, size, points[3].error)
    assert found == points[3]


def test_ties_are_decided_by_name() -> None:
    options = (Option("four", 4.0, 1, 0.0), Option("eight", 1.0, 2, 0.0))
    table = [Unit("transformer", (name,), (name,), 1, options) for name in ("b", "a", "c")]
    found = least_error(table, size, 4)
    assert [option.name for option in found.chosen] == ["four", "eight", "four"]
    assert [option.name for option in least_error(table[::-1], size, 4).chosen] == ["four", "eight", "four"]


def test_an_option_that_costs_more_and_spoils_more_is_never_chosen() -> None:
    options = (Option("four", 1.0, 1, 0.0), Option("eight", 2.0, 2, 0.0), Option("bf16", 0.0, 4, 0.0))
    table = [Unit("transformer", ("a",), ("a",), 1, options)]
    assert [point.chosen[0].name for point in frontier(table, size)] == ["four", "bf16"]
