"""How the activations of a component are quantized: at run time, with static scales from statistics, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omni_convert.convert.recipe import Recipe
from omni_convert.formats.config import ACTIVATION_SCHEMES
from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.format import Calibration
from omni_convert.formats.table import FORMATS

__all__ = ["ActivationScheme", "choose_activation_scheme", "merged_scheme"]

# Scheme → what its methods do with activations, unless these have static scales.
_HOW = {"none": "leaves activations as they are", "dynamic": "quantizes activations at run time"}


@dataclass(frozen=True)
class ActivationScheme:
    """How activations are quantized.

    Attributes:
        name: `dynamic`, `static` or `none`, as config blocks call it
        is_calibrated: the format has a use for statistics, and there are some
        note: why the scheme is not the one that the recipe suggests, or ""
        is_importance: that use is to weight errors, which works without the statistics of some layers, too
        rounding: `gptq` or `auto` if statistics decide how weights are rounded, which works without some layers, too
    """

    name: str
    is_calibrated: bool
    note: str = ""
    is_importance: bool = False
    rounding: str | None = None

    @property
    def uses_statistics(self) -> bool:
        return self.is_calibrated or self.rounding is not None

    @property
    def needs_every_layer(self) -> bool:
        """Whether a layer without statistics is an error."""
        return self.is_calibrated and not self.is_importance

    @property
    def needs_some_layer(self) -> bool:
        """Whether statistics of none of the layers are an error."""
        return self.is_importance or self.rounding == "gptq"


def choose_activation_scheme(method: str, recipe: Recipe, *, is_rounding: bool = False) -> ActivationScheme:
    """The scheme that a method has under a recipe; whether there are statistics counts, not what is in them.

    Args:
        is_rounding: statistics decide how weights are rounded

    Raises:
        RecipeError: the method does not support the scheme that the recipe asks for.
        CalibrationError: the scheme needs statistics, and the recipe names none.
    """
    is_scale = FORMATS[method].calibration is Calibration.INPUT_SCALE
    scheme = _choose_with_input_scale(method, recipe) if is_scale else _choose_without_input_scale(method, recipe)
    scheme = replace(scheme, rounding=recipe.effective_rounding if is_rounding else None)
    is_idle = recipe.is_calibrated and not scheme.uses_statistics and recipe.budget is None
    if is_idle and not scheme.note:
        return replace(scheme, note=f"{method} {_HOW[scheme.name]}: the statistics were not used")
    return scheme


def merged_scheme(schemes: Sequence[ActivationScheme]) -> ActivationScheme:
    """The scheme of a component with layers of several, at least one; static if some are."""
    named = max(schemes, key=lambda scheme: (scheme.name == "static", scheme.is_calibrated))
    notes = dict.fromkeys(scheme.note for scheme in schemes if scheme.note)
    return replace(
        named,
        note="; ".join(notes),
        is_importance=all(scheme.is_importance for scheme in schemes),
        rounding=next((scheme.rounding for scheme in schemes if scheme.rounding is not None), None),
    )


def _choose_without_input_scale(method: str, recipe: Recipe) -> ActivationScheme:
    """The scheme of a method whose layers store no input scale."""
    calibration, name = FORMATS[method].calibration, ACTIVATION_SCHEMES[method][0]
    if recipe.activation_scheme == "static" and (method == recipe.method or name != "none"):
        raise RecipeError(f"--activation-scheme static: {method} {_HOW[name]}, expected dynamic")
    is_smoothing = calibration is Calibration.SMOOTHING and not recipe.is_calibrated
    note = f"{method} without --calib smooths no inputs, whose outliers then cost more" if is_smoothing else ""
    is_calibrated = recipe.is_calibrated and calibration is not Calibration.UNUSED
    return ActivationScheme(name, is_calibrated, note, calibration is Calibration.IMPORTANCE)


def _choose_with_input_scale(method: str, recipe: Recipe) -> ActivationScheme:
    """The scheme of a method that can store an input scale, which needs statistics."""
    if "none" in ACTIVATION_SCHEMES[method]:
        if recipe.activation_scheme == "dynamic":
            raise RecipeError(
                f"--activation-scheme dynamic: {method} has static activations, or none without statistics"
            )
        if not recipe.is_calibrated and recipe.activation_scheme is None:
            return ActivationScheme(
                "none", False, f"{method} without --calib is weight-only: activations stay as they are"
            )
    default = "static" if recipe.is_calibrated else ACTIVATION_SCHEMES[method][0]
    wanted = recipe.activation_scheme or default
    if wanted == "static" and recipe.weight_block_size is not None:
        return ActivationScheme(
            "dynamic", False, "block-wise FP8 quantizes activations at run time: activations are dynamic, not static"
        )
    if wanted == "static" and not recipe.is_calibrated:
        raise CalibrationError(
            "--activation-scheme static: found no statistics; add --calib PROMPTS or --calibration STATISTICS"
        )
    return ActivationScheme(wanted, wanted == "static")
