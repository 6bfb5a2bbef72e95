"""What was recorded about a model's inputs, and what a conversion makes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.rounding import CompensatedFormat
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.config import ACTIVATION_SCHEMES
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.format import ElementFormat, QuantizingFormat
from omni_convert.formats.rows import InputStatistics
from omni_convert.formats.table import FORMATS, Calibration

if TYPE_CHECKING:
    from omni_convert.convert.calibration.statistics import Statistics

__all__ = ["RecordedInputs", "load_moments"]

RISKY_LAYERS_SHOWN = 3


@dataclass(frozen=True)
class RecordedInputs:
    """Activation statistics and second moments, where there are some."""

    statistics: Statistics | None = None
    moments: Moments | None = None

    def check_recorded_on(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        """Raises CalibrationError if they belong to another model than these components."""
        for recorded in (self.statistics, self.moments):
            for name, checkpoint in checkpoints.items():
                expected = recorded.identity.fingerprints.get(name) if recorded is not None else None
                if expected is not None and expected != checkpoint.fingerprint():
                    raise CalibrationError(
                        f"{name or checkpoint.path}: the statistics belong to another model (recorded on "
                        f"{expected[:12]}, this is {checkpoint.fingerprint()[:12]}); calibrate this model"
                    )

    def is_used_by(self, method: str, scheme: str) -> bool:
        """Whether the statistics set a scale of the method with this activation scheme."""
        smooths = self.statistics is not None and FORMATS[method].calibration is Calibration.MUL_SCALE
        return scheme == "static" or smooths

    def activation_scheme(self, method: str, recipe: Recipe, notes: list[str]) -> str:
        """How activations are quantized; says so in `notes` where the recipe led to expect something else.

        Raises:
            RecipeError: the method cannot have the scheme that the recipe asks for.
            CalibrationError: it needs statistics, and there are none.
        """
        default = ACTIVATION_SCHEMES[method][0]
        if FORMATS[method].calibration is not Calibration.INPUT_SCALE:
            if recipe.activation_scheme == "static":
                raise RecipeError(
                    f"--activation-scheme static: {method} quantizes activations at run time, expected dynamic"
                )
            if self.statistics is not None and FORMATS[method].calibration is Calibration.UNUSED:
                notes.append(f"{method} quantizes activations at run time: the statistics were not used")
            return default
        if method == "nvfp4":
            if recipe.activation_scheme == "dynamic":
                raise RecipeError(
                    "--activation-scheme dynamic: nvfp4 has static activations, or none without statistics"
                )
            if self.statistics is None and recipe.activation_scheme is None:
                notes.append("nvfp4 without --calib is weight-only: activations stay as they are")
                return "none"
        wanted = recipe.activation_scheme or ("static" if self.statistics is not None else default)
        if wanted == "static" and recipe.weight_block_size is not None:
            notes.append("block-wise FP8 quantizes activations at run time: activations are dynamic, not static")
            return "dynamic"
        if wanted == "static" and self.statistics is None:
            raise CalibrationError(
                "--activation-scheme static: found no statistics; add --calib PROMPTS or --calibration STATISTICS"
            )
        return wanted

    def inputs_of(self, group: LayerGroup, component: str) -> InputStatistics:
        """Statistics of what goes into a group; raises CalibrationError if there are none."""
        inputs = self.statistics.for_group(component, group.members) if self.statistics is not None else None
        if inputs is None:
            raise CalibrationError(
                f"{group.members[0]}: the statistics do not cover this layer of '{component or 'the model'}'; "
                f"calibrate with --component {component or 'transformer'}=METHOD, or ignore it"
            )
        return inputs

    def compensated(self, fmt: QuantizingFormat, group: LayerGroup, component: str, recipe: Recipe) -> QuantizingFormat:
        """The format of a group, rounded with its moments if there are some; raises CalibrationError if not for it."""
        if self.moments is None or not isinstance(fmt, ElementFormat):
            return fmt
        moments = self.moments.for_group(component, group.members)
        if moments is None:
            raise CalibrationError(
                f"{group.members[0]}: the moments do not cover this layer of '{component or 'the model'}'; "
                f"calibrate with --component {component or 'transformer'}=METHOD, or use --rounding nearest"
            )
        return CompensatedFormat(fmt, moments, recipe.effective_rounding)

    def risk_notes(self, component: str, quantized: Collection[str], recipe: Recipe) -> list[str]:
        """What a static scale means for layers whose inputs it fits badly."""
        layers = self.statistics.risky_layers() if self.statistics is not None else []
        risky = [layer for layer in layers if layer.component == component and layer.stem in quantized]
        if not risky:
            return []
        worst = "; ".join(str(layer) for layer in risky[:RISKY_LAYERS_SHOWN])
        more = f"; and {len(risky) - RISKY_LAYERS_SHOWN} more" if len(risky) > RISKY_LAYERS_SHOWN else ""
        return [
            f"{len(risky)} of {len(quantized)} layers have inputs that one static scale fits badly; they got "
            f"--input-scale {recipe.input_scale} like the others (--activation-scheme dynamic or --ignored-layers "
            f"avoids that): {worst}{more}"
        ]


def load_moments(recipe: Recipe, notes: list[str]) -> Moments | None:
    """The moments that rounding uses; their layers are read when they are rounded.

    Raises:
        CalibrationError: GPTQ is asked for without moments; a file is damaged, or of another run.
    """
    if recipe.effective_rounding == "nearest":
        if recipe.moments:
            notes.append("--rounding nearest: the moments were not used")
        elif recipe.rounding == "auto":
            notes.append("--rounding auto without --moments is nearest rounding")
        return None
    if not recipe.moments:
        raise CalibrationError(
            "--rounding gptq: found no moments; add --moments FILE, made by `omni-convert calibrate --moments FILE`"
        )
    first, *others = [Moments.load(path) for path in recipe.moments]
    return first.merge(others)
