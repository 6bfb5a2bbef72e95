"""Records what goes into the linears of a pipeline while it denoises prompts."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from omni_convert.convert.calibration.finished_prompts import FinishedPrompts
from omni_convert.convert.calibration.generation import GenerationSettings, has_step_callback, run_prompts
from omni_convert.convert.calibration.input_observer import InputObserver
from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.calibration.sensitivity_observer import SensitivityObserver
from omni_convert.convert.device import resolve_device
from omni_convert.convert.progress_bar import progress_bar
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.component_methods import component_methods
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.recording_header import CalibrationRun, Identity
from omni_convert.formats.statistics.sensitivity import PipelineSensitivity
from omni_convert.formats.statistics.statistics import Statistics

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["PipelineRecorder", "Recording", "calibrate", "recording_identity"]

Layer = TypeVar("Layer")
#: Gives the identity of a run over some prompts.
IdentityOf = Callable[[Sequence[Prompt]], Identity]

VERSIONED_PACKAGES = ("omni-convert", "torch", "diffusers", "transformers")
#: Settings that an identity names only where they are not these, since earlier statistics do not know them.
UNRECORDED = {"guidance_scale_2": None, "images_per_prompt": 1}


@dataclass(frozen=True)
class Recording:
    """The result of running over prompts: statistics, and second moments if they were asked for.

    Attributes:
        growth: layer → how much its largest input grew over the last quarter of the prompts; empty if that is unknown
    """

    statistics: Statistics
    moments: Moments | None
    growth: Mapping[str, float] = field(default_factory=dict)

    def merge(self, other: Recording) -> Recording:
        """The recording of the prompts of both; its moments are in memory.

        Raises:
            CalibrationError: they belong to different models.
        """
        statistics = self.statistics.merge([other.statistics])
        if self.moments is None or other.moments is None:
            return Recording(statistics, None)
        return Recording(statistics, self.moments.merge([other.moments]).in_memory())


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
    """Runs a loaded pipeline over prompts and records the inputs of its linears; see `PipelineRecorder`."""
    recorder = PipelineRecorder(pipe, settings, components=components, seed=seed, fingerprints=fingerprints)
    return recorder.record(prompts, progress=progress).statistics


class PipelineRecorder:
    """A loaded pipeline, and how to run it.

    The noise of a prompt depends on the seed and the prompt, not on its position. So prompts may be distributed over
    processes in any way, and the merged statistics are those of one process.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        settings: GenerationSettings | None = None,
        *,
        components: Sequence[str] | None = None,
        seed: int = 0,
        fingerprints: Mapping[str, str] | None = None,
        with_moments: bool = False,
        scratch: Path | None = None,
    ) -> None:
        """Prepares to run a pipeline.

        Args:
            pipe: an unquantized diffusers pipeline, on the device on which it runs
            components: `transformer`, `text_encoder`, ...; all denoising models if None
            fingerprints: component to `Checkpoint.fingerprint()`; without one, a component's statistics fit any model
            with_moments: record second moments, too
            scratch: folder for these if the pipeline is streamed, so that memory holds those of one block at a time
        """
        self._pipe = pipe
        self._settings = settings or GenerationSettings()
        self._components = components
        self._seed = seed
        self._fingerprints = fingerprints or {}
        self._with_moments = with_moments
        self._scratch = scratch
        self._checkpoints: Mapping[str, Checkpoint] = {}

    @classmethod
    def load(
        cls,
        source: Source,
        recipe: Recipe,
        weights: Mapping[str, Checkpoint] | None = None,
        *,
        with_moments: bool = False,
        scratch: Path | None = None,
    ) -> PipelineRecorder:
        """Loads the pipeline of a source, to be run as a recipe says.

        Args:
            weights: component to its weights, of every component that is recorded; None to open them
            scratch: see the constructor

        Raises:
            RecipeError: the pipeline does not take a setting.
            CheckpointError: the pipeline cannot be loaded.
        """
        from omni_convert.loaders.pipeline import load_pipeline  # seconds of imports

        width, height = recipe.calib_size or (None, None)
        overrides = {"steps": recipe.calib_steps, "width": width, "height": height, "frames": recipe.calib_frames}
        settings = GenerationSettings.for_pipeline(source.path, overrides)
        checkpoints = weights or {
            name: ComponentFolder(source, name).checkpoint() for name in component_methods(source, recipe)
        }
        recorder = cls(
            load_pipeline(source.path, device=resolve_device(recipe.device), memory=recipe.memory),
            settings,
            components=tuple(checkpoints),
            seed=recipe.seed,
            fingerprints={name: checkpoint.fingerprint() for name, checkpoint in checkpoints.items()},
            with_moments=with_moments,
            scratch=scratch,
        )
        recorder._checkpoints = checkpoints
        return recorder

    def record(
        self,
        prompts: Sequence[Prompt],
        differentiated: Sequence[Prompt] = (),
        *,
        progress: bool = False,
        keep: Path | None = None,
    ) -> Recording:
        """Runs the pipeline over prompts.

        Args:
            differentiated: prompts over which the sensitivity of the denoisers' layers is recorded, too
            progress: show a bar, if standard error is a terminal
            keep: a file for the statistics of prompts that have finished; if it exists, these are not run again. It is
                the caller's to remove. Second moments are not kept.

        Raises:
            CalibrationError: there are no prompts, or no linears to record; an input is NaN or infinite; the kept
                statistics come from another calibration; or the pipeline cannot be differentiated, though that is asked
                for.
            RecipeError: the pipeline does not take a setting or an image.
        """
        if not prompts:
            raise CalibrationError("calibration: found no prompts, expected at least one")
        settings = self._settings.completed(self._pipe)
        identity_of = partial(
            recording_identity, settings={**asdict(settings), "seed": self._seed}, fingerprints=self._fingerprints
        )
        finished = FinishedPrompts(None if self._with_moments else keep, prompts, identity_of)
        observer = self._sensitivity_observer() if differentiated else None
        recording = self._run(finished, settings, identity_of, progress=progress)
        sensitivity = recording.statistics.sensitivity if differentiated else None
        if observer is not None and sensitivity is None:
            sensitivity = self._differentiate(observer, differentiated, settings, progress=progress)
        return replace(recording, statistics=replace(recording.statistics, sensitivity=sensitivity))

    def _run(
        self, finished: FinishedPrompts, settings: GenerationSettings, identity_of: IdentityOf, *, progress: bool
    ) -> Recording:
        """The recording of all prompts, those of an earlier run included."""
        if finished.earlier is not None and not finished.remaining:
            return Recording(finished.earlier, None)
        observer = self._observe(finished, settings, identity_of, progress=progress)
        identity = identity_of(finished.remaining)
        statistics = finished.merged(Statistics(identity, self._as_stored(observer.statistics())))
        growth = self._as_stored(observer.growth()) if finished.earlier is None else {}
        if not self._with_moments:
            return Recording(statistics, None, growth)
        moments = Moments.recorded(identity, observer.moments())
        return Recording(statistics, replace(moments, owners=self._as_stored(moments.owners)), growth)

    def _observe(
        self, finished: FinishedPrompts, settings: GenerationSettings, identity_of: IdentityOf, *, progress: bool
    ) -> InputObserver:
        """The observer that has seen the pipeline run over the remaining prompts."""
        from omni_convert.loaders.loading.streamed import streamer_of  # seconds of imports

        tells_steps = has_step_callback(self._pipe)
        models = _modules(self._pipe, self._components)
        streamer = streamer_of(self._pipe)
        observer = InputObserver(
            models,
            counts_timesteps=not tells_steps,
            with_moments=self._with_moments,
            scratch=None if streamer is None else self._scratch,
        )
        if streamer is not None:
            streamer.at_give_up = lambda part: observer.rest(part.module)
        runs = [(prompt, _noise_seed(self._seed, prompt)) for prompt in finished.remaining]
        total = len(runs) * settings.steps if settings.steps and tells_steps else None
        with observer, progress_bar("calibrating", total, "step", hidden=not progress, stays=False) as advance:

            def after_step(step: int) -> None:
                observer.step = step + 1
                advance(1)

            def after_group(positions: Sequence[int]) -> None:
                # A text encoder has run for prompts that still wait: what was recorded of it is not theirs alone.
                if models.keys() <= {*DENOISERS} or observer.started == len(finished.done) + len(positions):
                    finished.add(positions, so_far)

            def so_far() -> Statistics:
                return Statistics(identity_of(finished.done), self._as_stored(observer.so_far()))

            run_prompts(
                self._pipe,
                runs,
                settings,
                on_start=observer.start,
                on_step=after_step,
                after_group=after_group,
                decode=False,
            )
        return observer

    def _sensitivity_observer(self) -> SensitivityObserver:
        from omni_convert.loaders.loading.streamed import streamer_of  # seconds of imports

        models = _modules(self._pipe, self._components)
        denoisers = {name: model for name, model in models.items() if name in DENOISERS}
        return SensitivityObserver(self._pipe, denoisers, streamer_of(self._pipe))

    def _differentiate(
        self,
        observer: SensitivityObserver,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        *,
        progress: bool,
    ) -> PipelineSensitivity:
        """The sensitivity of the layers of the denoisers that are recorded."""
        bar = progress_bar("differentiating", len(prompts), "prompt", hidden=not progress, stays=False)
        with observer, bar as advance:
            for prompt in prompts:
                observer.record(prompt, settings, _noise_seed(self._seed, prompt), _noise_seed(self._seed + 1, prompt))
                advance(1)
        found = observer.sensitivity()
        return replace(found, layers=self._as_stored(found.layers))

    def _as_stored(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        return _as_stored(layers, self._checkpoints)


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


def recording_identity(
    prompts: Iterable[Prompt], settings: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> Identity:
    """The identity of one run over prompts.

    Args:
        settings: on which the inputs of layers depend, by name
        fingerprints: component to `Checkpoint.fingerprint()`
    """
    versions = {f"{package} version": importlib.metadata.version(package) for package in VERSIONED_PACKAGES}
    used = {name: value for name, value in settings.items() if value != UNRECORDED.get(name, ...)}
    run = CalibrationRun(
        tuple(sorted({**used, **versions}.items())),
        tuple(sorted(prompt.fingerprint() for prompt in prompts)),
    )
    return Identity(dict(fingerprints), (run,))


def _as_stored(layers: Mapping[str, Layer], checkpoints: Mapping[str, Mapping[str, TensorSpec]]) -> dict[str, Layer]:
    """The layers under the names in their checkpoints, if these are known; transformers renames some on loading."""
    stems = {
        component: [name.removesuffix(".weight") for name, spec in tensors.items() if len(spec.shape) == 2]
        for component, tensors in checkpoints.items()
    }
    renamed = {}
    for name, layer in layers.items():
        component, _, stem = name.partition(".")
        renamed[f"{component}.{_stored_stem(stem, stems.get(component, ()))}"] = layer
    return renamed


def _stored_stem(stem: str, stored: Sequence[str]) -> str:
    """The stored name with the longest common ending, if only one has it; else the module's own name."""
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
