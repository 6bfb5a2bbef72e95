"""Switches FP8 attention on and off, for chosen layers and denoising steps. It is off by default.

A layer runs in FP8 while its processor names one of the backends of `diffusers_backends`. A model has no other state,
so copies, pickles and compiled blocks keep it, and the state dict is unchanged.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.errors import RecipeError
from omni_convert.loaders.attention.diffusers_backends import backend_of, is_fp8_backend
from omni_convert.loaders.attention.index_ranges import IndexRanges, IndexSpec
from omni_convert.loaders.attention.kernels import select_attention_kernel

__all__ = ["count_attention_backends", "disable_fp8_attention", "enable_fp8_attention"]

logger = logging.getLogger(__name__)

#: Attributes of a diffusers processor: the backend it names, and the one it named before.
CURRENT, NATIVE = "_attention_backend", "_native_attention_backend"

BLOCK_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def enable_fp8_attention(
    pipe_or_model: Any,
    *,
    backend: str | None = None,
    rotate: bool = False,
    skip_layers: IndexSpec = None,
    skip_steps: IndexSpec = None,
    device: str | torch.device | None = None,
) -> None:
    """Runs the attention of the denoising model(s) in FP8, with Q, K and V quantized per head.

    Cross attention to the text (`attn2`) stays as it is, as in vLLM-Omni. A second call replaces the choices of the
    first one.

    Args:
        pipe_or_model: a pipeline of diffusers, or one of its transformers
        backend: `flash_3`, `sage`, `flash_3_hub` (downloads it) or `reference` (plain torch: the arithmetic, no
            speed); None for the first installed one that the device runs
        rotate: multiply Q and K by one orthogonal matrix first, as vLLM-Omni does; their product stays the same. This
            helps if a channel is large in both. It harms if a channel is large in K alone: a number that all keys
            share drops out of the softmax, but only until the rotation mixes it. Heads must be a power of two wide
        skip_layers: blocks that stay as they are, as `0-9,20,25-30` or a list; counted from zero in each of a model's
            lists of blocks
        skip_steps: denoising steps that stay as they are, in the same notation; the pipeline's scheduler counts them
        device: the device that will run the model, if the model is elsewhere now; needed only to choose a kernel

    Raises:
        KernelError: no kernel runs on the device; gives every kernel's reason. The model raises it when it runs with
            a mask that hides more than padding, causal order, dropout, context parallelism, or heads that cannot be
            rotated.
        RecipeError: `skip_layers` or `skip_steps` is malformed or leaves nothing, the model does not use diffusers'
            attention dispatch, or nothing counts the steps.
    """
    layers, steps = IndexRanges.parse(skip_layers, "skip_layers"), IndexRanges.parse(skip_steps, "skip_steps")
    models = _denoisers(pipe_or_model)
    kernel = select_attention_kernel(backend, _device(pipe_or_model, device))
    if steps:
        _current_step(pipe_or_model)
    chosen = {name: _select(name, model, layers) for name, model in models.items()}
    kernel.prepare()
    disable_fp8_attention(pipe_or_model)
    fp8 = backend_of(kernel, rotate)
    for name, model in models.items():
        _set_apart(model, chosen[name])
        _use(model, fp8)
        if steps:
            model.register_forward_pre_hook(StepSwitch(pipe_or_model, fp8, steps))
        logger.info("%s: %d attention layers run %s", name, len(chosen[name]), fp8.value)


def disable_fp8_attention(pipe_or_model: Any) -> None:
    """Gives every layer back the backend that it had; does nothing if FP8 attention is off."""
    for model in _denoisers(pipe_or_model).values():
        hooks = model._forward_pre_hooks  # noqa: SLF001  # a handle on the model would not survive copies
        for key in [key for key, hook in hooks.items() if isinstance(hook, StepSwitch)]:
            del hooks[key]
        for processor in _enabled(model):
            if is_fp8_backend(getattr(processor, CURRENT)):  # else somebody has chosen another one since
                setattr(processor, CURRENT, getattr(processor, NATIVE))
            delattr(processor, NATIVE)


def count_attention_backends(modules: Iterable[nn.Module]) -> dict[str, int]:
    """Counts attention layers by the backend of diffusers that they name, or else by the active one."""
    active = AttentionBackendName(_AttentionBackendRegistry.get_active_backend()[0])
    named = (backend for module in modules for backend in _backends(module))
    return dict(Counter(AttentionBackendName(backend or active).value for backend in named))


def _backends(model: nn.Module) -> Iterator[AttentionBackendName | str | None]:
    """The backend that each layer names; the FP8 one for a layer that is in FP8 at some steps."""
    hooks = model._forward_pre_hooks.values()  # noqa: SLF001  # as in `disable_fp8_attention`
    at_some_steps = next((hook.fp8 for hook in hooks if isinstance(hook, StepSwitch)), None)
    for _, layer in _attention_layers(model):
        yield (at_some_steps if hasattr(layer.processor, NATIVE) else None) or getattr(layer.processor, CURRENT)


class StepSwitch:
    """A forward pre-hook of a denoising model: at the listed steps, layers run the backend that they had before.

    It asks the scheduler of the pipeline. So a step counts once even if guidance runs the model twice, and two experts
    share one count. It holds the pipeline weakly: a copied pipeline finds itself, an unpickled one does not.
    """

    def __init__(self, pipeline: Any, fp8: AttentionBackendName, steps: IndexRanges, is_on: bool = True) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self.fp8 = fp8
        self._steps = steps
        self._is_on = is_on

    @property
    def pipeline(self) -> Any:
        """The pipeline that counts the steps; None if it is gone."""
        return self._pipeline and self._pipeline()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch; a graph cannot ask for the step
    def __call__(self, model: nn.Module, _inputs: Any) -> None:
        is_on = _current_step(self.pipeline) not in self._steps
        if is_on != self._is_on:
            _use(model, self.fp8 if is_on else None)
            self._is_on = is_on

    def __deepcopy__(self, memo: dict[int, Any]) -> StepSwitch:
        return StepSwitch(memo.get(id(self.pipeline), self.pipeline), self.fp8, self._steps, self._is_on)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepSwitch, (None, self.fp8, self._steps, self._is_on)


def _current_step(pipeline: Any) -> int:
    """The number of denoising steps that this run of the pipeline has done.

    Raises:
        RecipeError: nothing counts them.
    """
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(scheduler, "step_index"):
        found = type(pipeline if scheduler is None else scheduler).__name__ if pipeline is not None else "no pipeline"
        raise RecipeError(
            f"skip_steps: found {found}, expected a pipeline whose scheduler has a step_index; "
            "call enable_fp8_attention with such a pipeline, or leave skip_steps out"
        )
    begin = getattr(scheduler, "begin_index", None) or 0  # a run that starts from an image begins there
    return 0 if scheduler.step_index is None else int(scheduler.step_index - begin)


def _denoisers(pipe_or_model: Any) -> dict[str, nn.Module]:
    if isinstance(pipe_or_model, nn.Module):
        return {type(pipe_or_model).__name__: pipe_or_model}
    components = getattr(pipe_or_model, "components", {})
    found = {name: components[name] for name in DENOISERS if isinstance(components.get(name), nn.Module)}
    if not found:
        name = type(pipe_or_model).__name__
        raise RecipeError(f"FP8 attention: found {name}, expected a model or a pipeline with one of {DENOISERS}")
    return found


def _device(pipe_or_model: Any, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if isinstance(pipe_or_model, nn.Module):
        tensors = itertools.chain(pipe_or_model.parameters(), pipe_or_model.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))
    return torch.device(pipe_or_model._execution_device)  # noqa: SLF001  # `device` is where an offloaded model waits


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(getattr(module, "processor", None), CURRENT):
            yield name, module


def _select(name: str, model: nn.Module, skipped: IndexRanges) -> list[Any]:
    """The layers to run in FP8.

    Raises:
        RecipeError: there are none, or layers should be skipped and none of the model is.
    """
    layers = [(path, layer) for path, layer in _attention_layers(model) if not path.endswith("attn2")]
    if not layers:
        raise RecipeError(
            f"FP8 attention: found no attention layer of {name} that goes through diffusers' attention dispatch, "
            "expected a transformer such as Flux's, Qwen-Image's, Wan's or Z-Image's; leave FP8 attention off"
        )
    chosen = [layer for path, layer in layers if _block_index(path) not in skipped]
    if not chosen or (skipped and len(chosen) == len(layers)):
        last = max(_block_index(path) for path, _ in layers)
        what = "every" if not chosen else "no"
        raise RecipeError(f"skip_layers: found {skipped}, which is {what} block of {name}, expected some of 0-{last}")
    return chosen


def _block_index(path: str) -> int:
    """3 for `transformer_blocks.3.attn`; -1, which no range contains, for a layer outside any list."""
    match = BLOCK_INDEX.search(path)
    return int(match[1]) if match else -1


def _set_apart(model: nn.Module, layers: list[Any]) -> None:
    """Gives each layer its own processor, which remembers its backend, because one may serve many layers."""
    owners = Counter(id(layer.processor) for _, layer in _attention_layers(model))
    for layer in layers:
        if owners[id(layer.processor)] > 1:
            layer.processor = copy.copy(layer.processor)
        setattr(layer.processor, NATIVE, getattr(layer.processor, CURRENT))


def _enabled(model: nn.Module) -> list[Any]:
    processors = [layer.processor for _, layer in _attention_layers(model)]
    return [processor for processor in processors if hasattr(processor, NATIVE)]


def _use(model: nn.Module, fp8: AttentionBackendName | None) -> None:
    """Points the chosen layers at an FP8 backend, or at the one that they had before."""
    for processor in _enabled(model):
        setattr(processor, CURRENT, getattr(processor, NATIVE) if fp8 is None else fp8)
