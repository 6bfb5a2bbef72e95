"""Calibration: the pipeline denoises prompts, hooks on its linears record what goes into them.

Nothing that the pipeline computes is kept: every input is measured where it passes and forgotten. Padding is left out
where the model names it (a mask [batch, tokens] among the arguments of a module): the runtime computes it too, but no
result depends on it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import logging
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from omni_convert.convert.generation import GenerationSettings, has_step_callback, run_pipeline
from omni_convert.convert.layer_statistics import InputRecorder, LayerStatistics, observe
from omni_convert.convert.moments import InputMoments, Moments, MomentsRecorder
from omni_convert.convert.prompts import Prompt, read_prompts
from omni_convert.convert.statistics import CalibrationRun, Identity, Statistics
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.families import EVERY_RUNTIME
from omni_convert.formats.family import find_family
from omni_convert.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from omni_convert.convert.recipe import Recipe
    from omni_convert.convert.source import Source

__all__ = [
    "InputObserver",
    "Recording",
    "SourceRecorder",
    "calibrate",
    "calibrate_source",
    "candidate_layers",
    "progress_bar",
    "record",
    "record_source",
]

logger = logging.getLogger(__name__)

Recorded = TypeVar("Recorded")

DENOISERS = ("transformer", "transformer_2", "transformer_3", "unet")
#: Arguments that mark the tokens of a module's own sequence: 1 or True where they are no padding.
MASK_PARAMETERS = ("attention_mask", "attn_mask")
VERSIONED_PACKAGES = ("omni-convert", "torch", "diffusers", "transformers")
#: Seconds before a progress bar shows.
PROGRESS_DELAY = 2.0


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
        from omni_convert.convert.distributed_calibration import record_on_cluster  # an extra

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
        from omni_convert.convert.plan import component_methods
        from omni_convert.formats.checkpoint import Checkpoint
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
    with observer, progress_bar(total, hidden=not progress) as bar:

        def after_step(step: int) -> None:
            observer.step = step + 1
            bar.update()

        for prompt in prompts:
            observer.start(prompt)
            run_pipeline(pipe, [prompt], settings, _noise_seed(seed, prompt), on_step=after_step, decode=False)
    identity = _identity(prompts, settings, seed, fingerprints or {})
    moments = Moments.recorded(identity, observer.moments()) if with_moments else None
    return Recording(Statistics(identity, observer.statistics()), moments)


def candidate_layers(model: nn.Module) -> dict[str, str]:
    """Linears that some runtime may run quantized, each with the first member of its fused group (or itself).

    The members of a group read one input, so that they have their statistics in common.
    """
    specs = {
        name: TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    family = find_family(type(model).__name__)
    groups = [group.members for runtime in EVERY_RUNTIME for group in family.layer_groups(specs, runtime)]
    first: dict[str, str] = {}
    for members in sorted(groups, key=len, reverse=True):
        for stem in members:
            if isinstance(model.get_submodule(stem), nn.Linear):
                first.setdefault(stem, members[0])
    return first


class InputObserver:
    """Records the inputs of the candidate linears of some models while it is entered.

    Attributes:
        step: the denoising step that runs, from 0. Set by whoever runs the pipeline.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], *, counts_timesteps: bool = False, with_moments: bool = False
    ) -> None:
        """Prepares to watch some models.

        Args:
            models: by component name
            counts_timesteps: a step ends when a model is called with another `timestep`; for pipelines that do not
                tell when one is over
            with_moments: record second moments, too

        Raises:
            CalibrationError: a model has no linears that can be quantized.
        """
        self.step = 0
        self._prompt = ""
        self._counts_timesteps = counts_timesteps
        self._timestep: float | None = None
        self._models = dict(models)
        self._recorder_type = MomentsRecorder if with_moments else InputRecorder
        self._recorders: dict[str, InputRecorder] = {}
        self._mask: Tensor | None = None
        # The recorder that took something in last, and what: q, k and v read one tensor, which counts once.
        self._last: tuple[InputRecorder, weakref.ref[Tensor], int] | None = None
        self._hooks = ExitStack()
        self._candidates = {component: candidate_layers(model) for component, model in self._models.items()}
        for component, layers in self._candidates.items():
            if not layers:
                raise CalibrationError(
                    f"{component}: found no linear layers that can be quantized, expected an unquantized model"
                )

    def start(self, prompt: Prompt) -> None:
        """Begins another prompt: its text is encoded before the first step."""
        self.step = 0
        self._timestep = None
        self._prompt = prompt.text

    def __enter__(self) -> InputObserver:
        with ExitStack() as hooks:
            for component, model in self._models.items():
                if self._counts_timesteps:
                    hooks.callback(model.register_forward_pre_hook(self._count_timestep, with_kwargs=True).remove)
                for module in model.modules():
                    self._watch_mask(module, hooks)
                for stem, first in self._candidates[component].items():
                    recorder = self._recorders.setdefault(f"{component}.{first}", self._recorder_type())
                    self._watch_input(model.get_submodule(stem), f"{component}.{stem}", recorder, hooks)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._last = self._mask = None

    def statistics(self) -> dict[str, LayerStatistics]:
        """What was recorded, by `component.stem`; layers that never ran are left out."""
        found = self._by_layer({name: recorder.statistics() for name, recorder in self._recorders.items()})
        for component, layers in self._candidates.items():
            for stem in layers:
                if f"{component}.{stem}" not in found:
                    logger.warning("%s.%s never ran: it has no statistics", component, stem)
        return found

    def moments(self) -> dict[str, InputMoments]:
        """Second moments, likewise, if they were recorded; those of layers that read one input are one object."""
        recorders = self._recorders.items()
        return self._by_layer(
            {name: recorder.moments() for name, recorder in recorders if isinstance(recorder, MomentsRecorder)}
        )

    def _by_layer(self, recorded: Mapping[str, Recorded | None]) -> dict[str, Recorded]:
        by_stem = {
            f"{component}.{stem}": recorded.get(f"{component}.{first}")
            for component, layers in self._candidates.items()
            for stem, first in layers.items()
        }
        return {name: layer for name, layer in sorted(by_stem.items()) if layer is not None}

    def _watch_input(self, layer: nn.Module, name: str, recorder: InputRecorder, hooks: ExitStack) -> None:
        @torch.no_grad()
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values: Tensor = args[0] if args else kwargs["input"]
            if self._is_repeated(values, recorder):
                return
            rows = self._without_padding(values)
            if rows.shape[0] == 0:
                return
            observation = observe(rows)
            if not math.isfinite(observation.amax):
                raise CalibrationError(
                    f"{name}: found NaN or Inf in its input at denoising step {self.step} of "
                    f"'{self._prompt:.40}', expected finite values; check the weights, or run in another dtype"
                )
            recorder.record(observation, self.step)

        hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)

    def _is_repeated(self, values: Tensor, recorder: InputRecorder) -> bool:
        version = 0 if values.is_inference() else values._version  # noqa: SLF001  # torch has no other name for it
        if self._last is not None:
            last_recorder, last_values, last_version = self._last
            if last_recorder is recorder and last_values() is values and last_version == version:
                return True
        self._last = (recorder, weakref.ref(values), version)
        return False

    def _without_padding(self, values: Tensor) -> Tensor:
        """An input [..., in] as rows [rows, in], those of tokens that count."""
        rows = values.detach().reshape(-1, values.shape[-1])
        if self._mask is None or self._mask.shape != values.shape[:-1]:
            return rows
        return rows[self._mask.flatten().to(rows.device)]

    def _count_timestep(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("timestep"), Tensor):
            timestep = float(kwargs["timestep"].max())
            if self._timestep is not None and timestep != self._timestep:
                self.step += 1
            self._timestep = timestep

    def _watch_mask(self, module: nn.Module, hooks: ExitStack) -> None:
        """While a module that got a mask runs, the mask says which of the tokens inside count."""
        names = list(inspect.signature(module.forward).parameters)
        positions = {name: names.index(name) for name in MASK_PARAMETERS if name in names}
        if not positions:
            return
        outer: list[Tensor | None] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outer.append(self._mask)
            for name, position in positions.items():
                mask = kwargs.get(name, args[position] if position < len(args) else None)
                if _is_token_mask(mask):
                    self._mask = None if bool(mask.all()) else mask.bool()

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._mask = outer.pop()

        hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)


def _is_token_mask(mask: object) -> TypeGuard[Tensor]:
    """A mask [batch, tokens]; what is added to attention scores is of a float dtype, or has more dimensions."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()


def _modules(pipe: DiffusionPipeline, components: Sequence[str] | None) -> dict[str, nn.Module]:
    present = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    wanted = [name for name in DENOISERS if name in present] if components is None else components
    for name in wanted:
        if name not in present:
            raise CalibrationError(f"{type(pipe).__name__}: found no '{name}', expected one of {', '.join(present)}")
    return {name: present[name] for name in wanted}


def progress_bar(total: int | None, *, hidden: bool, unit: str = "step") -> tqdm[Any]:
    """A bar on standard error, if that is a terminal and the work takes a while."""
    return tqdm(
        total=total,
        desc="calibrating",
        unit=unit,
        delay=PROGRESS_DELAY,
        disable=True if hidden else None,  # None: only on a terminal
        leave=False,
    )


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
