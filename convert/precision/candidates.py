"""Other choices within the budget of one: by rules that people use, and with predictions trusted less.

Predictions add up effects of layers as if they were independent. Where a few directions dominate, they are not, and a
simple rule can do better: `convert.trial` runs them all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from omni_convert.convert.precision.advice import dominant, role_of
from omni_convert.convert.precision.analysis import Analysis
from omni_convert.convert.precision.choice import Cost, Option, Point, Unit, least_error, total
from omni_convert.formats.arithmetic.ggml.mixtures import MIXTURES, types_of

__all__ = ["PREDICTED", "candidates"]

#: Name of the choice that predictions lead to.
PREDICTED = "as predicted"
#: Part of the limit that rules spend, since the headers of files differ with the choice, too.
PART_SPENT = 0.999
BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.")


def candidates(analysis: Analysis, point: Point, cost: Cost) -> dict[str, Point]:
    """Different choices that cost no more than one, which comes first, by name."""
    limit = total(point.chosen, cost)
    found = {PREDICTED: point}
    for name, other in _others(analysis, cost, PART_SPENT * limit):
        if total(other.chosen, cost) <= limit and other not in found.values():
            found[name] = other
    return found


def _others(analysis: Analysis, cost: Cost, limit: float) -> Iterator[tuple[str, Point]]:
    units = analysis.units
    cautious = least_error([_tempered(unit) for unit in units], cost, limit)
    if cautious is not None:
        chosen = zip(units, cautious.chosen, strict=True)
        yield "by square roots of predictions", Point(tuple(unit.option(option.name) for unit, option in chosen))
    yield "first and last blocks", _upgraded(units, _distances(units), cost, limit)
    for role, _ in dominant(analysis):
        order = [role_of(unit) != role for unit in units]
        yield f"{role} first", _upgraded(units, order, cost, limit)
    for name in MIXTURES:
        types = types_of(name, [unit.names[0] + ".weight" for unit in units]).values()
        if all(kind in unit.option_names for unit, kind in zip(units, types, strict=True)):
            yield name, Point(tuple(unit.option(kind) for unit, kind in zip(units, types, strict=True)))


def _tempered(unit: Unit) -> Unit:
    """The unit with errors that differ less."""
    return replace(unit, options=tuple(replace(each, error=math.sqrt(each.error)) for each in unit.options))


def _distances(units: Sequence[Unit]) -> list[float]:
    """For each unit, how many blocks lie between its own and the nearer end of its stack."""
    places = [BLOCK.match(unit.names[0]) for unit in units]
    last: dict[tuple[str, str], int] = {}
    for unit, place in zip(units, places, strict=True):
        if place is not None:
            stack = unit.component, place["stack"]
            last[stack] = max(last.get(stack, 0), int(place["number"]))
    return [
        math.inf
        if place is None
        else min(int(place["number"]), last[unit.component, place["stack"]] - int(place["number"]))
        for unit, place in zip(units, places, strict=True)
    ]


def _upgraded(units: Sequence[Unit], ranks: Sequence[float], cost: Cost, limit: float) -> Point:
    """All units in their cheapest options, and those of the lowest ranks in the best ones that the limit allows."""
    chosen = [min(unit.options, key=_by(cost)) for unit in units]
    spent = total(chosen, cost)
    for place in sorted(range(len(units)), key=lambda number: (ranks[number], units[number].key)):
        room = limit - spent + cost(chosen[place])
        fitting = [each for each in units[place].options if cost(each) <= room]
        best = min([chosen[place], *fitting], key=lambda each: (each.error, each.name))
        spent += cost(best) - cost(chosen[place])
        chosen[place] = best
    return Point(tuple(chosen))


def _by(cost: Cost) -> Callable[[Option], Any]:
    return lambda option: (cost(option), option.error, option.name)
