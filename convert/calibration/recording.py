"""Calibration: the pipeline denoises prompts, and what goes into its linears is recorded."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from omni_convert.convert.calibration.generation import GenerationSettings, has_step_callback, run_pipeline
from omni_convert.convert.calibration.input_observer import InputObserver
from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.prompts import Prompt, read_prompts
from omni_convert.convert.calibration.recording_header import CalibrationRun, Identity
from omni_convert.convert.calibration.statistics import Statistics
from omni_convert.convert.progress_bar import progress_bar
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CalibrationError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from omni_convert.convert.recipe import Recipe
    from omni_convert.convert.source.location import Source

__all__ = [
    "Recording",
    "SourceRecorder",
    "calibrate",
    "calibrate_source",
    "record",
    "record_source",
]

Recorded = TypeVar("Recorded")

VERSIONED_PACKAGES = ("omni-convert", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Recording:
    """What one run over prompts recorded: statistics, and second moments where they were asked for."""

    statistics: Statistics
    moments: Moments | None


def calibrate_source(source: Source, recipe: Recipe, *, progress: bool = True) -> Statistics:
    """Loads a pipeline and calibrates it as a recipe says; raises as `record_source`."""
    return record_source(source, recipe, progress=progress).statistics


def record_source(source: Source, recipe: Recipe, *, with_moments: bool = False, progress: bool = True) -> Recording:
    """Loads a pipeline and calibrates it as a recipe says.

    Raises:
        CalibrationError: the source is no pipeline; there are no prompts; the pipeline computes NaN.
        RecipeError: the pipeline does not take a setting.
        CheckpointError: the pipeline cannot be loaded.
    """
    assert recipe.calib is not None, "the caller names the prompts"
    prompts = read_prompts(recipe.calib)[: recipe.calib_prompts]
    if not source.is_pipeline:
        raise CalibrationError(
            f"{source.path}: found no pipeline (model_index.json), which calibrating has to run; give the whole "
            f"pipeline, or --calibration with its statistics"
        )
    if recipe.is_distributed:
        from omni_convert.convert.calibration.distributed import record_on_cluster  # an extra

        return record_on_cluster(source, recipe, prompts, with_moments=with_moments, progress=progress)
    return SourceRecorder(source, recipe, with_moments=with_moments).record(prompts, progress=progress)


class SourceRecorder:
    """The pipeline of a source, loaded, which is calibrated as a recipe says."""

    def __init__(self, source: Source, recipe: Recipe, *, with_moments: bool = False) -> None:
        """Loads the pipeline.

        Raises:
            RecipeError: the pipeline does not take a setting.
            CheckpointError: the pipeline cannot be loaded.
        """
        from omni_convert.convert.device import resolve_device
        from omni_convert.convert.source.component_methods import component_methods
        from omni_convert.formats.containers.checkpoint import Checkpoint
        from omni_convert.loaders.pipeline import load_pipeline

        width, height = recipe.calib_size or (None, None)
        overrides = {"steps": recipe.calib_steps, "width": width, "height": height, "frames": recipe.calib_frames}
        self._settings = GenerationSettings.for_pipeline(source.path, overrides)
        components = component_methods(source, recipe)
        self._checkpoints = {name: Checkpoint.open(source.path / name) for name in components}
        self._fingerprints = {name: checkpoint.fingerprint() for name, checkpoint in self._checkpoints.items()}
        self._pipe = load_pipeline(source.path, device=resolve_device(recipe.device))
        self._seed = recipe.seed
        self._with_moments = with_moments

    def record(self, prompts: Sequence[Prompt], *, progress: bool = False) -> Recording:
        """Runs prompts; raises as `record_source`."""
        recording = record(
            self._pipe,
            prompts,
            self._settings,
            components=tuple(self._checkpoints),
            seed=self._seed,
            fingerprints=self._fingerprints,
            with_moments=self._with_moments,
            progress=progress,
        )
        statistics, moments = recording.statistics, recording.moments
        return Recording(
            Statistics(statistics.identity, _as_stored(statistics.layers, self._checkpoints)),
            None if moments is None else replace(moments, owners=_as_stored(moments.owners, self._checkpoints)),
        )


def calibrate(
    pipe: DiffusionPipeline,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | None = None,
    *,
    components: Sequence[str] | None = None,
    seed: int = 0,
    fingerprints: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Statistics:
    """Runs a pipeline over prompts and records the inputs of its linears.

    The noise of a prompt follows from the seed and the prompt, not from its place: prompts may be spread over
    processes in any way, and the merged statistics are those of one process.

    Args:
        pipe: an unquantized diffusers pipeline, on the device on which it runs
        components: `transformer`, `text_encoder`, ...; all denoising models if None
        fingerprints: component to `Checkpoint.fingerprint()`; without one, a component's statistics fit any model
        progress: show a bar, if standard error is a terminal

    Raises:
        CalibrationError: there are no prompts, or no linears to record; or an input is NaN or infinite.
        RecipeError: the pipeline does not take a setting or an image.
    """
    return record(
        pipe, prompts, settings, components=components, seed=seed, fingerprints=fingerprints, progress=progress
    ).statistics


def record(
    pipe: DiffusionPipeline,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | None = None,
    *,
    components: Sequence[str] | None = None,
    seed: int = 0,
    fingerprints: Mapping[str, str] | None = None,
    with_moments: bool = False,
    progress: bool = False,
) -> Recording:
    """What `calibrate` does, and second moments beside it."""
    if not prompts:
        raise CalibrationError("calibration: found no prompts, expected at least one")
    settings = (settings or GenerationSettings()).completed(pipe)
    tells_steps = has_step_callback(pipe)
    observer = InputObserver(_modules(pipe, components), counts_timesteps=not tells_steps, with_moments=with_moments)
    total = len(prompts) * settings.steps if settings.steps and tells_steps else None
    with observer, progress_bar("calibrating", total, "step", hidden=not progress, stays=False) as advance:

        def after_step(step: int) -> None:
            observer.step = step + 1
            advance(1)

        for prompt in prompts:
            observer.start(prompt)
            run_pipeline(pipe, [prompt], settings, _noise_seed(seed, prompt), on_step=after_step, decode=False)
    identity = _identity(prompts, settings, seed, fingerprints or {})
    moments = Moments.recorded(identity, observer.moments()) if with_moments else None
    return Recording(Statistics(identity, observer.statistics()), moments)


def _modules(pipe: DiffusionPipeline, components: Sequence[str] | None) -> dict[str, nn.Module]:
    present = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    wanted = [name for name in DENOISERS if name in present] if components is None else components
    for name in wanted:
        if name not in present:
            raise CalibrationError(f"{type(pipe).__name__}: found no '{name}', expected one of {', '.join(present)}")
    return {name: present[name] for name in wanted}


def _noise_seed(seed: int, prompt: Prompt) -> int:
    digest = hashlib.sha256(f"{seed}:{prompt.fingerprint()}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _identity(
    prompts: Iterable[Prompt], settings: GenerationSettings, seed: int, fingerprints: Mapping[str, str]
) -> Identity:
    versions = {f"{package} version": importlib.metadata.version(package) for package in VERSIONED_PACKAGES}
    run = CalibrationRun(
        tuple(sorted({**asdict(settings), "seed": seed, **versions}.items())),
        tuple(sorted(prompt.fingerprint() for prompt in prompts)),
    )
    return Identity(dict(fingerprints), (run,))


def _as_stored(
    layers: Mapping[str, Recorded], checkpoints: Mapping[str, Mapping[str, TensorSpec]]
) -> dict[str, Recorded]:
    """The layers under the names of the checkpoint: transformers renames some while it loads them."""
    stems = {
        component: [name.removesuffix(".weight") for name, spec in tensors.items() if len(spec.shape) == 2]
        for component, tensors in checkpoints.items()
    }
    renamed = {}
    for name, layer in layers.items():
        component, _, stem = name.partition(".")
        renamed[f"{component}.{_stored_stem(stem, stems[component])}"] = layer
    return renamed


def _stored_stem(stem: str, stored: Sequence[str]) -> str:
    """The name in the checkpoint that ends like a module's name, if there is exactly one that ends most like it."""
    if stem in stored:
        return stem
    lengths = {name: _common_parts(stem, name) for name in stored}
    longest = max(lengths.values(), default=0)
    nearest = [name for name, length in lengths.items() if length == longest]
    return nearest[0] if longest > 0 and len(nearest) == 1 else stem


def _common_parts(first: str, second: str) -> int:
    count = 0
    for left, right in zip(reversed(first.split(".")), reversed(second.split(".")), strict=False):
        if left != right:
            break
        count += 1
    return count
