"""A budget becomes a choice: what each group of layers gets, so that the images change least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from omni_convert.convert.budget import KEPT, format_size, parse_size
from omni_convert.convert.plan.plan import plan_conversion
from omni_convert.convert.precision.analysis import Analysis, analyze
from omni_convert.convert.precision.choice import Cost, Option, Point, cheapest_below, frontier, least_error, total
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import Source
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["Mixture", "budget_cost", "bytes_beside", "choose_mixture", "mixture_of"]

# Header sizes depend a little on the choice, which depends on them.
MOST_ROUNDS = 8


def _size(option: Option) -> float:
    return option.size


def _time(option: Option) -> float:
    return option.time


@dataclass(frozen=True)
class Mixture:
    """A choice, and the table that it was made from.

    Attributes:
        trial: choice → RMSE in grey levels, of all that were run; the best of them is `point`
    """

    analysis: Analysis
    point: Point
    trial: Mapping[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Mapping[str, Mapping[str, str]]:
        """Component to the choice for each of its groups, as `plan_conversion` takes it."""
        return self.analysis.methods_of(self.point)

    @property
    def noise_ratio(self) -> float:
        """The predicted noise ratio of the images."""
        return self.analysis.noise_ratio(self.point.error)

    @property
    def note(self) -> str:
        """One line for the user about what was chosen."""
        layers: dict[str, int] = {}
        for unit, option in zip(self.analysis.units, self.point.chosen, strict=True):
            layers[option.name] = layers.get(option.name, 0) + len(unit.layers)
        counts = ", ".join(f"{count} {name}" for name, count in sorted(layers.items()))
        bits = 8 * self.point.size / self.analysis.weights
        return f"formats of layers: {counts}; {bits:.2f} bits per weight; predicted noise ratio {self.noise_ratio:.2f}"

    @property
    def trial_note(self) -> str:
        """One line about the choices that were run; empty if none were."""
        ranked = sorted(self.trial.items(), key=lambda item: item[1])
        results = ", ".join(f"{name} {error:.3f}" for name, error in ranked)
        return f"RMSE of the choices that were tried: {results}" if ranked else ""


def choose_mixture(
    source: Source, recipe: Recipe, statistics: Statistics, advance: Callable[[int], None] = lambda _: None
) -> Mixture:
    """Decides what each group of a model's layers gets.

    Raises:
        RecipeError: the budget cannot be met, which the nearest one that can is named for.
        CalibrationError: no sensitivity was recorded, or not that of the model.
        CheckpointError: the stored analysis is damaged.
    """
    if recipe.analysis is None:
        analysis = analyze(source, recipe, statistics, advance)
    else:
        analysis = Analysis.load(recipe.analysis)
        analysis.check(recipe.analysis, statistics, recipe)
    return mixture_of(source, recipe, analysis)


def mixture_of(source: Source, recipe: Recipe, analysis: Analysis) -> Mixture:
    """The choice that a table and the recipe's budget lead to; raises RecipeError if the budget cannot be met."""
    if recipe.target_noise is not None:
        point = _below_noise(analysis, recipe.target_noise)
    elif recipe.target_speed is not None:
        point = _within(analysis, recipe, _time, recipe.target_speed * analysis.weights, recipe.target_speed)
    elif recipe.target_bits is not None:
        point = _within(analysis, recipe, _size, recipe.target_bits / 8 * analysis.weights, recipe.target_bits)
    else:
        point = _within_size(source, recipe, analysis)
    if all(option.name == KEPT for option in point.chosen):
        raise RecipeError(f"{recipe.budget}: found that every layer has to stay as it is, expected one that can change")
    return Mixture(analysis, point)


def budget_cost(recipe: Recipe) -> Cost:
    """What a recipe's budget limits: time, or bytes."""
    return _size if recipe.target_speed is None else _time


def bytes_beside(source: Source, recipe: Recipe, analysis: Analysis) -> int:
    """Bytes of the files of weights beside those that a choice counts: headers, and tensors that always stay."""
    cheapest = next(frontier(analysis.units, _size))
    settled = replace(recipe, formats=recipe.mixed_formats)
    return plan_conversion(source, settled, analysis.methods_of(cheapest)).file_bytes - cheapest.size


def _below_noise(analysis: Analysis, noise_ratio: float) -> Point:
    point = cheapest_below(analysis.units, _size, analysis.error_of(noise_ratio))
    if point is None:
        *_, best = frontier(analysis.units, _size)
        raise RecipeError(
            f"--target-noise {noise_ratio:g}: found no choice below {analysis.noise_ratio(best.error):.3g}, which is "
            "the nearest; add a format with smaller errors to --formats"
        )
    return point


def _within(analysis: Analysis, recipe: Recipe, cost: Callable[[Option], float], limit: float, asked: float) -> Point:
    point = least_error(analysis.units, cost, limit)
    if point is None:
        cheapest = next(frontier(analysis.units, cost))
        nearest = total(cheapest.chosen, cost) * asked / limit
        raise RecipeError(
            f"{recipe.budget}: found no choice below {nearest:.3g}, which is the nearest; add a smaller format to "
            "--formats"
        )
    return point


def _within_size(source: Source, recipe: Recipe, analysis: Analysis) -> Point:
    """The least error within the size of files, which hold headers and the tensors that stay, too."""
    asked = parse_size(recipe.target_size or "")

    def others(point: Point) -> int:
        return plan_conversion(source, recipe, analysis.methods_of(point)).file_bytes - point.size

    limit = asked - bytes_beside(source, recipe, analysis)
    for _ in range(MOST_ROUNDS):
        point = least_error(analysis.units, _size, limit)
        if point is None:
            break
        excess = point.size + others(point) - asked
        if excess <= 0:
            return point
        limit -= excess
    nearest = next(frontier(analysis.units, _size)).size + bytes_beside(source, recipe, analysis)
    raise RecipeError(
        f"{recipe.budget}: found no choice below {format_size(nearest)}, which is the nearest; add a smaller format to "
        "--formats"
    )
