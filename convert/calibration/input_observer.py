"""Records the inputs of linears with hooks while a model runs.

No input is kept: each is measured in passing. Padding is left out if the model marks it with a mask [batch, tokens]
among the arguments of a module: the runtime computes padding too, but no result depends on it.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from omni_convert.convert.calibration.growth import growth_of
from omni_convert.convert.calibration.moments import InputMoments, MomentsRecorder
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CalibrationError, listed
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import EVERY_RUNTIME
from omni_convert.formats.families.table import find_family
from omni_convert.formats.statistics.layer_statistics import InputRecorder, LayerStatistics, observe
from omni_convert.formats.statistics.statistics import MORE_STEPS

__all__ = ["InputObserver", "candidate_layers"]

logger = logging.getLogger(__name__)

Recorded = TypeVar("Recorded")

# Layers that never ran have a warning each, or one for all that names the first.
MOST_WARNINGS = 50
LAYERS_SHOWN = 3
#: Arguments that mask the tokens of a module's own sequence: 1 or True for tokens that are not padding.
MASK_PARAMETERS = ("attention_mask", "attn_mask")


def candidate_layers(model: nn.Module, family: Family | None = None) -> dict[str, str]:
    """Maps each linear that some runtime may run quantized to the first member of its fused group, or to itself.

    The members of a group read one input, so they share their statistics.

    Args:
        family: of the model, if its class does not tell
    """
    specs = {
        name: TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    family = family or find_family(type(model).__name__)
    groups = [group.members for runtime in EVERY_RUNTIME for group in family.layer_groups(specs, runtime)]
    first: dict[str, str] = {}
    for members in sorted(groups, key=len, reverse=True):
        for stem in members:
            if isinstance(model.get_submodule(stem), nn.Linear):
                first.setdefault(stem, members[0])
    return first


class _Place(threading.local):
    """Where a prompt is in its run; prompts that run side by side have a thread each.

    Attributes:
        prompt: its text
        prompt_id: a number of 60 bits that tells it from other prompts
        number: its place among the prompts, from 0
        step: the denoising step, from 0
        timestep: that of the model's last call
        mask: of the tokens of the module that runs; None if no token is padding
        outer_masks: those of the modules around it
        last: the last recorder and its input: q, k and v read the same tensor, which must be counted once
    """

    def __init__(self) -> None:
        self.prompt = ""
        self.prompt_id = 0
        self.number = 0
        self.step = 0
        self.timestep: float | None = None
        self.mask: Tensor | None = None
        self.outer_masks: list[Tensor | None] = []
        self.last: tuple[InputRecorder, weakref.ref[Tensor], int] | None = None


class InputObserver:
    """Records the inputs of the candidate linears of some models while it is entered."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        *,
        family: Family | None = None,
        counts_timesteps: bool = False,
        with_moments: bool = False,
        scratch: Path | None = None,
    ) -> None:
        """Prepares to watch some models.

        Args:
            models: component name → model
            family: of the models, if their classes do not tell
            counts_timesteps: a step ends when a model is called with another `timestep`; for pipelines without a
                callback at the end of a step
            with_moments: also record second moments
            scratch: folder for files with these, see `MomentsRecorder`

        Raises:
            CalibrationError: a model has no linears that can be quantized.
        """
        self._place = _Place()
        self._started = 0
        self._maxima: dict[str, dict[int, float]] = {}
        self._counts_timesteps = counts_timesteps
        self._models = dict(models)
        self._new_recorder = partial(MomentsRecorder, scratch) if with_moments else InputRecorder
        self._recorder_of: dict[nn.Module, InputRecorder] = {}
        self._recorders: dict[str, InputRecorder] = {}
        self._hooks = ExitStack()
        self._candidates = {component: candidate_layers(model, family) for component, model in self._models.items()}
        for component, layers in self._candidates.items():
            if not layers:
                raise CalibrationError(
                    f"{component}: found no linear layers that can be quantized, expected an unquantized model"
                )

    def start(self, prompt: Prompt) -> None:
        """Begins another prompt in the thread that runs it; its text is encoded before the first step."""
        self.step = 0
        self._place.timestep = None
        self._place.prompt = prompt.text
        self._place.prompt_id = int(prompt.fingerprint()[:15], 16)
        self._place.number = self._started
        self._started += 1

    @property
    def step(self) -> int:
        """The denoising step of this thread's prompt, from 0; the code that runs the pipeline sets it."""
        return self._place.step

    @step.setter
    def step(self, step: int) -> None:
        self._place.step = step

    def __enter__(self) -> InputObserver:
        with ExitStack() as hooks:
            for component, model in self._models.items():
                if self._counts_timesteps:
                    hooks.callback(model.register_forward_pre_hook(self._count_timestep, with_kwargs=True).remove)
                for module in model.modules():
                    self._watch_mask(module, hooks)
                for stem, first in self._candidates[component].items():
                    recorder = self._recorders.setdefault(f"{component}.{first}", self._new_recorder())
                    self._recorder_of[model.get_submodule(stem)] = recorder
                    maxima = self._maxima.setdefault(f"{component}.{first}", {})
                    self._watch_input(model.get_submodule(stem), f"{component}.{stem}", recorder, maxima, hooks)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._place = _Place()

    @property
    def started(self) -> int:
        """The number of prompts that have begun."""
        return self._started

    def growth(self) -> dict[str, float]:
        """How much the largest input of each layer grew over the last quarter of the prompts; see `growth_of`."""
        return self._by_layer({name: growth_of(maxima, self._started) for name, maxima in self._maxima.items()})

    def so_far(self) -> dict[str, LayerStatistics]:
        """Statistics by `component.stem`; layers that have not run are left out."""
        return self._by_layer({name: recorder.statistics() for name, recorder in self._recorders.items()})

    def statistics(self) -> dict[str, LayerStatistics]:
        """The final statistics by `component.stem`; warns of layers that never ran, which are left out."""
        found = self.so_far()
        names = [f"{component}.{stem}" for component, layers in self._candidates.items() for stem in layers]
        idle = [name for name in self._candidates if not any(layer.startswith(f"{name}.") for layer in found)]
        for component in idle if len(idle) < len(self._candidates) else ():
            logger.warning("%s never ran: it has no statistics; %s", component, MORE_STEPS)
            names = [name for name in names if not name.startswith(f"{component}.")]
        absent = [name.removeprefix(".") for name in names if name not in found]
        if len(absent) > MOST_WARNINGS:  # of experts there are thousands
            absent = [listed(absent, LAYERS_SHOWN)]
        for name in absent:
            logger.warning("%s never ran: it has no statistics", name)
        return found

    def moments(self) -> dict[str, InputMoments]:
        """Second moments by `component.stem`, if they were recorded; layers that read one input share one object."""
        recorders = self._recorders.items()
        return self._by_layer(
            {name: recorder.moments() for name, recorder in recorders if isinstance(recorder, MomentsRecorder)}
        )

    def rest(self, module: nn.Module) -> None:
        """Leaves the second moments of a module's layers in their files until these run again."""
        for layer in module.modules():
            recorder = self._recorder_of.get(layer)
            if isinstance(recorder, MomentsRecorder):
                recorder.rest()

    def _by_layer(self, recorded: Mapping[str, Recorded | None]) -> dict[str, Recorded]:
        by_stem = {
            f"{component}.{stem}": recorded.get(f"{component}.{first}")
            for component, layers in self._candidates.items()
            for stem, first in layers.items()
        }
        return {name: layer for name, layer in sorted(by_stem.items()) if layer is not None}

    def _watch_input(
        self, layer: nn.Module, name: str, recorder: InputRecorder, maxima: dict[int, float], hooks: ExitStack
    ) -> None:
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
                    f"'{self._place.prompt:.40}', expected finite values; check the weights, or run in another dtype"
                )
            recorder.record(observation, self.step, self._place.prompt_id)
            number = self._place.number
            maxima[number] = max(maxima.get(number, 0.0), observation.amax)

        hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)

    def _is_repeated(self, values: Tensor, recorder: InputRecorder) -> bool:
        version = 0 if values.is_inference() else values._version  # noqa: SLF001  # torch has no other name for it
        if self._place.last is not None:
            last_recorder, last_values, last_version = self._place.last
            if last_recorder is recorder and last_values() is values and last_version == version:
                return True
        self._place.last = (recorder, weakref.ref(values), version)
        return False

    def _without_padding(self, values: Tensor) -> Tensor:
        """An input [..., in] as rows [rows, in], without the rows of padding."""
        rows = values.detach().reshape(-1, values.shape[-1])
        mask = self._place.mask
        if mask is None or mask.shape != values.shape[:-1]:
            return rows
        return rows[mask.flatten().to(rows.device)]

    def _count_timestep(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("timestep"), Tensor):
            timestep = float(kwargs["timestep"].max())
            if self._place.timestep is not None and timestep != self._place.timestep:
                self.step += 1
            self._place.timestep = timestep

    def _watch_mask(self, module: nn.Module, hooks: ExitStack) -> None:
        """Applies a mask that a module gets to everything inside the module while it runs."""
        names = list(inspect.signature(module.forward).parameters)
        positions = {name: names.index(name) for name in MASK_PARAMETERS if name in names}
        if not positions:
            return

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._place.outer_masks.append(self._place.mask)
            for name, position in positions.items():
                mask = kwargs.get(name, args[position] if position < len(args) else None)
                if _is_token_mask(mask):
                    self._place.mask = None if bool(mask.all()) else mask.bool()

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            if self._place.outer_masks:  # none if an error came before the mask
                self._place.mask = self._place.outer_masks.pop()

        hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)


def _is_token_mask(mask: object) -> TypeGuard[Tensor]:
    """Whether it is a mask [batch, tokens]; masks that are added to attention scores are floats or have more axes."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()
