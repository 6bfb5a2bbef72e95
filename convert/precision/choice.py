"""The choice itself: an option for each unit, with the least error that a budget allows. Pure arithmetic.

Errors and costs of units add up. Along the lower convex hull of each unit's options, the step that lowers the error
most for its cost comes first: that is the optimum for every budget at which a step ends, and between two of them the
budget's rest goes to the next steps that still fit. Ties are decided by name, so that the same numbers always give the
same choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Cost", "Option", "Point", "Unit", "cheapest_below", "frontier", "least_error", "total"]


@dataclass(frozen=True)
class Option:
    """A way to store the layers of a unit.

    Attributes:
        name: a method, a type of GGUF, or `bf16`: the layers stay as they are
        error: mean square by which it changes the images, of values from 0 to 1
        size: bytes in the file
        time: of the matrix products, in units of one weight's in BF16
    """

    name: str
    error: float
    size: int
    time: float


#: The cost of an option that a budget limits.
Cost = Callable[[Option], float]


@dataclass(frozen=True)
class Unit:
    """Layers that get one format together.

    Attributes:
        component: `transformer`, ...
        names: the runtime's names of its groups
        layers: names of its layers in the checkpoint
        weights: number of weights
        options: at least one
    """

    component: str
    names: tuple[str, ...]
    layers: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Decides ties: the unit with the smaller key comes first."""
        return self.component, self.names[0]

    @property
    def option_names(self) -> set[str]:
        return {option.name for option in self.options}

    def option(self, name: str) -> Option:
        """Its option of a name."""
        return next(option for option in self.options if option.name == name)


@dataclass(frozen=True)
class Point:
    """An option for each unit, in the order of the units."""

    chosen: tuple[Option, ...]

    @property
    def error(self) -> float:
        return math.fsum(option.error for option in self.chosen)

    @property
    def size(self) -> int:
        return sum(option.size for option in self.chosen)


@dataclass(frozen=True)
class _Step:
    """A unit's move from one option of its hull to the next, dearer one."""

    gain: float
    unit: int
    place: int
    cost: float
    option: Option


def total(options: Sequence[Option], cost: Cost) -> float:
    """The cost of options together."""
    return math.fsum(cost(option) for option in options)


def _hull(unit: Unit, cost: Cost) -> list[Option]:
    """The options from the cheapest to the best that no mixture of others beats, in ascending order of cost."""
    hull: list[Option] = []
    for option in sorted(unit.options, key=lambda each: (cost(each), each.error, each.name)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], cost) <= _slope(hull[-1], option, cost):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option, cost: Cost) -> float:
    """The error that a move takes away, for a unit of cost."""
    difference = cost(second) - cost(first)
    return (first.error - second.error) / difference if difference > 0 else math.inf


def _steps(units: Sequence[Unit], hulls: Sequence[Sequence[Option]], cost: Cost) -> list[_Step]:
    """All moves, the best first; those of one unit are in the order of its hull, since its slopes fall."""
    steps = [
        _Step(_slope(before, after, cost), number, place, cost(after) - cost(before), after)
        for number, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull), start=1)
    ]
    return sorted(steps, key=lambda step: (-step.gain, units[step.unit].key, step.place))


def frontier(units: Sequence[Unit], cost: Cost) -> Iterator[Point]:
    """The best choices from the cheapest to that with the least error, one step apart."""
    hulls = [_hull(unit, cost) for unit in units]
    chosen = [hull[0] for hull in hulls]
    yield Point(tuple(chosen))
    for step in _steps(units, hulls, cost):
        chosen[step.unit] = step.option
        yield Point(tuple(chosen))


def least_error(units: Sequence[Unit], cost: Cost, limit: float) -> Point | None:
    """The choice with the least error whose cost is within a limit; None if there is none."""
    hulls = [_hull(unit, cost) for unit in units]
    chosen, places = [hull[0] for hull in hulls], [0] * len(hulls)
    spent = total(chosen, cost)
    if spent > limit:
        return None
    for step in _steps(units, hulls, cost):
        if places[step.unit] == step.place - 1 and spent + step.cost <= limit:
            chosen[step.unit], places[step.unit] = step.option, step.place
            spent = total(chosen, cost)
    return Point(tuple(chosen))


def cheapest_below(units: Sequence[Unit], cost: Cost, error: float) -> Point | None:
    """The first choice of the frontier whose error is within a limit; None if there is none."""
    return next((point for point in frontier(units, cost) if point.error <= error), None)
