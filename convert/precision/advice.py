"""Sums up a table: which layers dominate the error, and which budgets are worth their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from omni_convert.convert.budget import format_size
from omni_convert.convert.precision.analysis import Analysis
from omni_convert.convert.precision.choice import Option, Point, Unit, frontier

__all__ = ["Budget", "Share", "analysis_lines", "budgets", "curve", "dominant", "role_of", "shares"]

ROWS_SHOWN = 12
ROLES_SHOWN = 3


@dataclass(frozen=True)
class Share:
    """A unit in its smallest format.

    Attributes:
        part: of the error of a model whose units all are in their smallest formats
        saved: bytes that it saves over BF16
    """

    unit: Unit
    option: Option
    part: float
    saved: int


@dataclass(frozen=True)
class Budget:
    """A point of the curve of size and noise.

    Attributes:
        name: `smaller`, `knee` or `better`
        size: bytes of the units
        noise: predicted noise ratio
    """

    name: str
    point: Point
    size: int
    noise: float


def _size(option: Option) -> float:
    return option.size


def shares(analysis: Analysis) -> list[Share]:
    """The units, those with the largest part of the error first."""
    smallest = [min(unit.options, key=lambda option: (option.size, option.error)) for unit in analysis.units]
    everything = math.fsum(option.error for option in smallest) or 1.0
    rows = [
        Share(unit, option, option.error / everything, 2 * unit.weights - option.size)
        for unit, option in zip(analysis.units, smallest, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row.part, row.unit.key))


def dominant(analysis: Analysis) -> list[tuple[str, float]]:
    """The roles of layers with the largest parts of the error, and these parts."""
    parts: dict[str, float] = {}
    for row in shares(analysis):
        parts[role_of(row.unit)] = parts.get(role_of(row.unit), 0.0) + row.part
    return sorted(parts.items(), key=lambda item: (-item[1], item[0]))[:ROLES_SHOWN]


def role_of(unit: Unit) -> str:
    """The name of a unit's layers without the numbers of their blocks."""
    return ".".join(piece for piece in unit.names[0].split(".") if not piece.isdigit())


def curve(analysis: Analysis) -> list[Budget]:
    """Size and noise of the best choices, from the smallest on."""
    points = frontier(analysis.units, _size)
    return [Budget("", point, point.size, analysis.noise_ratio(point.error)) for point in points]


def budgets(analysis: Analysis) -> list[Budget]:
    """Three choices: at the knee of the curve, and halfway from there to its ends.

    The knee lies farthest below the straight line between the ends, with noise on a logarithmic scale.
    """
    points = curve(analysis)
    first, last = points[0], points[-1]
    span, fall = last.size - first.size, math.log(first.noise / last.noise)

    def below(point: Budget) -> float:
        along = (point.size - first.size) / span if span else 0.0
        return 1 - along - (math.log(point.noise / last.noise) / fall if fall else 0.0)

    knee = max(points, key=below)
    wanted = (("smaller", (first.size + knee.size) / 2), ("knee", knee.size), ("better", (knee.size + last.size) / 2))
    found = [(name, max((each for each in points if each.size <= size), key=_point_size)) for name, size in wanted]
    return [Budget(name, each.point, each.size, each.noise) for name, each in found]


def _point_size(budget: Budget) -> int:
    return budget.size


def analysis_lines(analysis: Analysis, *, others: int) -> Iterator[str]:
    """The lines that `omni-convert analyze` prints.

    Args:
        others: bytes of the files of weights beside those of the units
    """
    rows = shares(analysis)
    width = max(len(_label(row.unit)) for row in rows[:ROWS_SHOWN])
    yield f"{'layers':<{width}}  {'format':<16} {'share of the error':>18} {'saves':>10}"
    for row in rows[:ROWS_SHOWN]:
        saved = format_size(row.saved) if row.saved > 0 else "0B"
        yield f"{_label(row.unit):<{width}}  {row.option.name:<16} {row.part:>18.1%} {saved:>10}"
    if len(rows) > ROWS_SHOWN:
        yield f"... and {len(rows) - ROWS_SHOWN} more, in the file"
    yield "most of the error: " + ", ".join(f"{role} {part:.0%}" for role, part in dominant(analysis))
    for budget in budgets(analysis):
        bits = 8 * budget.size / analysis.weights
        size = format_size(budget.size + others)
        yield f"{budget.name:<8} --target-size {size:<9} noise ratio {budget.noise:.2f}, {bits:.2f} bits per weight"


def _label(unit: Unit) -> str:
    name = f"{unit.component}.{unit.names[0]}"
    return name if len(unit.names) == 1 else f"{name} and {len(unit.names) - 1} more"
