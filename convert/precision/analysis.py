"""The table of a model: what every format costs and spoils in every layer; and the noise that errors are.

The noise ratio is the RMSE against the BF16 images over the RMSE between BF16 and FP32 images, both in whole grey
levels: how much quantizing changes a picture, in units of what BF16 itself changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omni_convert.convert.budget import BUDGETS, KEPT
from omni_convert.convert.device import resolve_device
from omni_convert.convert.plan.quantizing import target_of
from omni_convert.convert.plan.selection import choose_layers
from omni_convert.convert.plan.steps import matrix_shape
from omni_convert.convert.plan.target import Target
from omni_convert.convert.precision.choice import Option, Point, Unit
from omni_convert.convert.precision.prediction import ReadRows, predicted_error
from omni_convert.convert.precision.rates import relative_time
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component import SourceComponent, open_components
from omni_convert.convert.source.component_methods import component_methods
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import WrittenSpelling
from omni_convert.formats.errors import CalibrationError, CheckpointError, RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.rows import InputStatistics
from omni_convert.formats.statistics.sensitivity import PipelineSensitivity
from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["Analysis", "analyze"]

VERSION = 1
#: What rounding both images to whole grey levels adds to the mean square of their difference, in units of 1.
GREY_LEVELS = 2 / 12 / 255**2


@dataclass(frozen=True)
class Analysis:
    """The options of every unit of a model, and what they cost and spoil.

    Attributes:
        units: layers that get one format together
        rounding: mean square by which computing in BF16 changes the images
        recipe: the options on which the table depends
        statistics: identity of the statistics that it was computed from
    """

    units: tuple[Unit, ...]
    rounding: float
    recipe: Mapping[str, Any]
    statistics: str

    def noise_ratio(self, error: float) -> float:
        """The noise ratio of an error: a quantized model computes in BF16, too, and rounds otherwise."""
        return math.sqrt(1 + error / (self.rounding + GREY_LEVELS))

    def error_of(self, noise_ratio: float) -> float:
        """The error of a noise ratio; below 0 for ratios below 1, which nothing reaches."""
        return (noise_ratio**2 - 1) * (self.rounding + GREY_LEVELS)

    @property
    def weights(self) -> int:
        """Number of weights of all units."""
        return sum(unit.weights for unit in self.units)

    def methods_of(self, point: Point) -> dict[str, dict[str, str]]:
        """Component to the runtime's name of each of its groups to the option that was chosen for it."""
        methods: dict[str, dict[str, str]] = {}
        for unit, option in zip(self.units, point.chosen, strict=True):
            methods.setdefault(unit.component, {}).update(dict.fromkeys(unit.names, option.name))
        return methods

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "statistics": self.statistics,
            "recipe": dict(self.recipe),
            "rounding": self.rounding,
            "units": [asdict(unit) for unit in self.units],
        }

    @classmethod
    def load(cls, path: Path) -> Analysis:
        """Reads what `omni-convert analyze` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or of another version.
        """
        content = read_json(path)
        try:
            if content["version"] != VERSION:
                raise CheckpointError(f"{path}: found version {content['version']!r:.20}, expected {VERSION}")
            units = tuple(
                Unit(
                    str(unit["component"]),
                    tuple(map(str, unit["names"])),
                    tuple(map(str, unit["layers"])),
                    int(unit["weights"]),
                    tuple(
                        Option(str(each["name"]), float(each["error"]), int(each["size"]), float(each["time"]))
                        for each in unit["options"]
                    ),
                )
                for unit in content["units"]
            )
            found = cls(units, float(content["rounding"]), dict(content["recipe"]), str(content["statistics"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: found a damaged analysis, expected one of `omni-convert analyze`") from None
        if not units or not all(unit.options and unit.names for unit in units):
            raise CheckpointError(f"{path}: found an analysis without options, expected one of `omni-convert analyze`")
        return found

    def check(self, path: Path, statistics: Statistics, recipe: Recipe) -> None:
        """Raises RecipeError if the table was computed from other statistics or with other options."""
        if self.statistics != statistics.fingerprint():
            raise RecipeError(f"--analysis {path}: found the analysis of other statistics; run analyze again")
        if dict(self.recipe) != analyzed_options(recipe):
            raise RecipeError(f"--analysis {path}: found an analysis with other options; run analyze again with these")


def analyzed_options(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe on which the table depends, as JSON has them."""
    settled = replace(recipe, formats=recipe.mixed_formats)
    options = {name: value for name, value in settled.of_the_bytes().items() if name not in (*BUDGETS, "trial")}
    parsed: dict[str, Any] = json.loads(json.dumps(options))
    return parsed


def analyze(
    source: Source, recipe: Recipe, statistics: Statistics, advance: Callable[[int], None] = lambda _: None
) -> Analysis:
    """Computes the table of a model.

    Args:
        recipe: which formats there are to choose from
        advance: called with the number of bytes of each weight that was dealt with

    Raises:
        CalibrationError: no sensitivity was recorded, or not that of the model.
        CheckpointError, RecipeError: see `plan_conversion`
    """
    recipe = replace(recipe, formats=recipe.mixed_formats)  # which also settles the dialect
    sensitivity = statistics.sensitivity
    if sensitivity is None:
        raise CalibrationError(
            "the statistics: found no sensitivity of layers, which budgets need; record it with "
            "`omni-convert calibrate --sensitivity`"
        )
    methods = {name: method for name, method in component_methods(source, recipe).items() if method == recipe.method}
    components = open_components(source, methods, recipe)
    statistics.identity.check_model({name: component.weights for name, component in components.items()})
    device = resolve_device(recipe.device)
    units = [
        unit
        for component in components.values()
        if component.is_denoiser
        for unit in _Table(component, recipe, statistics, sensitivity, device, advance).units()
    ]
    if not units:
        raise CalibrationError(f"{source.name}: found no layers with a recorded sensitivity; calibrate its denoisers")
    return Analysis(tuple(units), sensitivity.rounding_error, analyzed_options(recipe), statistics.fingerprint())


@dataclass(frozen=True)
class _Table:
    """The table of one component."""

    component: SourceComponent
    recipe: Recipe
    statistics: Statistics
    sensitivity: PipelineSensitivity
    device: torch.device
    advance: Callable[[int], None]

    def units(self) -> list[Unit]:
        """The units of the component, in the order of its layers.

        Raises:
            RecipeError: a format cannot be used for the model.
        """
        targets = {name: self._target(name) for name in self.recipe.mixed_formats if name != KEPT}
        options: dict[LayerGroup, list[Option]] = {}
        known = {*target_of(self.component, self.recipe.method, self.recipe).scope().groups}
        for name, target in targets.items():
            for group in choose_layers(target).chosen:
                if group in known:
                    options.setdefault(group, []).append(self._option(name, target, group))
        some_target = next(iter(targets.values()))
        return _by_stack([(group, self._unit(some_target, group, found)) for group, found in options.items()])

    def _target(self, name: str) -> Target:
        """The target of the component with all layers in one format."""
        if self.recipe.method == "gguf":
            return target_of(self.component, "gguf", replace(self.recipe, gguf_type=name))
        return target_of(self.component, name, self.recipe)

    def _unit(self, target: Target, group: LayerGroup, found: Sequence[Option]) -> Unit:
        specs = self._specs(group)
        weights = sum(spec.elements for spec in specs)
        size = sum(spec.elements * target.dtype_of_copy(spec, is_layer=True).itemsize for spec in specs)
        kept = [Option(KEPT, 0.0, size, float(weights))] if KEPT in self.recipe.mixed_formats else []
        return Unit(self.component.name, (group.runtime_name,), group.members, weights, (*found, *kept))

    def _option(self, name: str, target: Target, group: LayerGroup) -> Option:
        fmt, specs = target.format_of(group), self._specs(group)
        size = 0
        for spec in specs:
            spelling = target.dialect.spelling(fmt, matrix_shape(spec))
            assert isinstance(spelling, WrittenSpelling), "`choose_layers` keeps what cannot be written"
            layouts = spelling.layout(fmt.layout(*matrix_shape(spec))).values()
            size += sum(math.prod(layout.shape) * layout.dtype.itemsize for layout in layouts)
        rows = [ReadRows(self.component.weights.rows(spec.name), self.device) for spec in specs]
        sensitivities = [self.sensitivity.layers.get(f"{self.component.name}.{stem}") for stem in group.members]
        error = predicted_error(fmt, rows, sensitivities, self._inputs(target, group))
        self.advance(sum(spec.nbytes for spec in specs))
        time = sum(spec.elements for spec in specs) * relative_time(fmt)
        return Option(name, error / self.sensitivity.prompts, size, time)

    def _inputs(self, target: Target, group: LayerGroup) -> InputStatistics | None:
        """Statistics of a group's input, if its format has a use for them."""
        if not target.scheme.is_calibrated:
            return None
        of = self.statistics.importance_inputs if target.scheme.is_importance else self.statistics.inputs_of
        return of(self.component.name, group.members)

    def _specs(self, group: LayerGroup) -> list[TensorSpec]:
        return [self.component.weights[f"{stem}{WEIGHT}"] for stem in group.members]


def _by_stack(units: Sequence[tuple[LayerGroup, Unit]]) -> list[Unit]:
    """The units, with the experts of a stack as one, which has the options that all of them have."""
    parts: dict[str, list[Unit]] = {}
    for group, unit in units:
        parts.setdefault(group.stack or f"/{group.runtime_name}", []).append(unit)
    return [_joined(found) for found in parts.values()]


def _joined(units: Sequence[Unit]) -> Unit:
    first = units[0]
    names = [each.name for each in first.options if all(each.name in unit.option_names for unit in units)]
    options = []
    for name in names:
        same = [unit.option(name) for unit in units]
        error, time = math.fsum(each.error for each in same), math.fsum(each.time for each in same)
        options.append(Option(name, error, sum(each.size for each in same), time))
    return Unit(
        first.component,
        tuple(name for unit in units for name in unit.names),
        tuple(layer for unit in units for layer in unit.layers),
        sum(unit.weights for unit in units),
        tuple(options),
    )
