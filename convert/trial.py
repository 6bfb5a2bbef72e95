"""Runs a pipeline with several choices of one budget, and takes the one with which the images change least.

Each choice is converted to a folder of its own and run by the loader, so that the trial sees what a user gets. The
folder is removed before the next one is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from omni_convert.convert.budget import parse_size
from omni_convert.convert.calibration.prompts import read_prompts
from omni_convert.convert.comparison.comparison import RunOptions, Variant, run_variant, settings_of
from omni_convert.convert.comparison.metrics import Image, rmse
from omni_convert.convert.device import resolve_device
from omni_convert.convert.plan.plan import Plan, plan_conversion
from omni_convert.convert.precision.candidates import candidates
from omni_convert.convert.precision.choice import Point
from omni_convert.convert.precision.mixture import Mixture, budget_cost
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import Source
from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["tried"]

#: Converts a plan to a folder.
Convert = Callable[[Plan, Path], None]


def tried(
    source: Source, recipe: Recipe, statistics: Statistics, mixture: Mixture, convert: Convert, scratch: Path
) -> Mixture:
    """The best of several choices within the budget of a mixture, on the recipe's trial prompts.

    Args:
        scratch: folder for one conversion at a time

    Raises:
        CalibrationError: the prompts cannot be read.
        CheckpointError: the loader does not run what was converted.
    """
    assert recipe.trial is not None, "the caller names the prompts"
    prompts = read_prompts(recipe.trial)
    overrides = {"steps": recipe.calib_steps, "frames": recipe.calib_frames}
    overrides |= dict(zip(("width", "height"), recipe.calib_size, strict=True)) if recipe.calib_size else {}
    settings = settings_of(Variant("reference", str(source.path)), overrides)
    options = RunOptions(device=resolve_device(recipe.device), memory=recipe.memory)

    def run(folder: Path) -> list[Image]:
        return run_variant(Variant("trial", str(folder)), prompts, settings, recipe.seed, options).images

    here = replace(recipe, engine="local", resume=False)
    reference, points = run(source.path), _points(source, here, mixture)
    errors: dict[str, float] = {}
    for name, point in points.items():
        plan = plan_conversion(source, here, mixture.analysis.methods_of(point)).with_statistics(statistics)
        with TemporaryDirectory(dir=scratch, prefix="trial-") as folder:
            convert(plan, Path(folder) / "model")
            errors[name] = rmse(reference, run(Path(folder) / "model"))
    best = min(errors, key=lambda name: errors[name])  # of equal ones the first: the predicted choice
    return replace(mixture, point=points[best], trial=errors)


def _points(source: Source, recipe: Recipe, mixture: Mixture) -> dict[str, Point]:
    """The choices to try, by name; of files that may not be larger than a size, those that are not."""
    found = candidates(mixture.analysis, mixture.point, budget_cost(recipe))
    if recipe.target_size is None:
        return found
    largest, methods_of = parse_size(recipe.target_size), mixture.analysis.methods_of
    return {
        name: point
        for name, point in found.items()
        if plan_conversion(source, recipe, methods_of(point)).file_bytes <= largest
    }
