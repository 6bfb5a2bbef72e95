"""Records how errors of linears change the images: one backward pass through each denoising step of a prompt.

The whole run of a pipeline is differentiated, so that guidance, scheduler, later steps and the decoder weigh an error
as they do in use. Memory holds the inputs of each call of a denoiser, and of one call those of each block: the rest is
computed again in the backward pass, for which a streamed block is brought again. Parameters get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni_convert.convert.calibration.generation import GenerationSettings, differentiable_images
from omni_convert.convert.calibration.input_observer import candidate_layers
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.exact_sums import add_sums, exact_sums
from omni_convert.formats.statistics.sensitivity import LayerSensitivity, PipelineSensitivity, SensitivityRecorder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from omni_convert.loaders.memory.streaming import Streamer

__all__ = ["SensitivityObserver"]

#: A number is rounded to BF16 by up to half of 2^-7 times its power of two.
BF16_STEP = 2.0**-7
SMALLEST_NORMAL = 2.0**-126

Record = Callable[..., None]


class _Tap(torch.autograd.Function):
    """Returns a tensor unchanged; hands its gradient, and tensors that belong to it, to a function."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, record: Record, *beside: Tensor) -> Tensor:  # noqa: ARG004  # the anchor starts the graph
        ctx.record = record
        ctx.save_for_backward(*beside)  # which checkpointing computes again instead of keeping it
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.record(gradient, *ctx.saved_tensors)
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


class SensitivityObserver:
    """Watches the candidate linears of a pipeline's denoisers while it is entered."""

    def __init__(
        self, pipe: DiffusionPipeline, models: Mapping[str, nn.Module], streamer: Streamer | None = None
    ) -> None:
        """Prepares to watch.

        Args:
            models: component name → denoiser
            streamer: what brings the pipeline's models part by part; None if it is loaded whole

        Raises:
            CalibrationError: a streamed model cannot compute single blocks again.
        """
        for model in models.values() if streamer is not None else ():
            if not _can_checkpoint(model):
                raise CalibrationError(
                    f"{type(model).__name__}: found that it cannot compute single blocks again, which gradients of a "
                    "streamed model need, expected --memory full"
                )
        self._streamer = streamer
        self._rests = {} if streamer is None else {part.component: part for part in streamer.parts if not part.block}
        self._pipe = pipe
        self._models = dict(models)
        self._anchor = torch.zeros((), requires_grad=True)
        self._recorders: dict[str, SensitivityRecorder] = {}
        self._rounding = 0.0
        self._roundings: list[Tensor] = []
        self._hooks = ExitStack()

    def __enter__(self) -> SensitivityObserver:
        with ExitStack() as hooks:
            for model in [each for each in self._pipe.components.values() if isinstance(each, nn.Module)]:
                hooks.enter_context(_without_gradients(model))
                hooks.enter_context(_checkpointed_blocks(model))
                for module in _rounding_modules(model):
                    hooks.callback(module.register_forward_hook(self._round).remove)
            for component, model in self._models.items():
                hooks.enter_context(_checkpointed(model, self._bringing(component)))
                for stem in candidate_layers(model):
                    self._watch_layer(f"{component}.{stem}", model.get_submodule(stem), hooks)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def record(self, prompt: Prompt, settings: GenerationSettings, seed: int, direction_seed: int) -> None:
        """Runs the pipeline over a prompt, and back.

        Raises:
            CalibrationError: the pipeline cannot be differentiated, or gradients are NaN or infinite.
        """
        with nullcontext() if self._streamer is None else self._streamer.sparing_gradients():
            images = differentiable_images(self._pipe, prompt, settings, seed)
        generator = torch.Generator("cpu").manual_seed(direction_seed)
        direction = torch.randn(images.shape, generator=generator)
        if images.requires_grad:
            torch.autograd.backward(images, direction.to(images.device, images.dtype))
        had_gradients = [recorder.finish_prompt(images.numel()) for recorder in self._recorders.values()]
        if not any(had_gradients):
            raise CalibrationError(
                f"{type(self._pipe).__name__}: found images without gradients, expected them to depend on the "
                "denoiser's output by differentiable operations; choose layers with --ignored-layers"
            )
        if images.dtype == torch.bfloat16:
            self._record_rounding(torch.ones_like(images), images.detach())
        self._roundings.append(exact_sums(torch.tensor([self._rounding / images.numel()])))
        self._rounding = 0.0

    def sensitivity(self) -> PipelineSensitivity:
        """Everything that was recorded, over at least one prompt."""
        found = {name: recorder.sensitivity() for name, recorder in sorted(self._recorders.items())}
        layers: dict[str, LayerSensitivity] = {name: layer for name, layer in found.items() if layer is not None}
        return PipelineSensitivity(layers, add_sums(self._roundings), len(self._roundings))

    def _bringing(self, component: str) -> Callable[[], None]:
        """What has to happen before a model computes something again."""
        if self._streamer is None or component not in self._rests:
            return _nothing
        return partial(self._streamer.enter, self._rests[component])

    def _watch_layer(self, name: str, layer: nn.Module, hooks: ExitStack) -> None:
        assert isinstance(layer, nn.Linear), "candidate layers are linears"
        device = layer.weight.device if self._streamer is None else self._streamer.device
        recorder = SensitivityRecorder(name, layer.out_features, layer.in_features, device)
        self._recorders[name] = recorder

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not torch.is_grad_enabled():
                return None
            return (self._tapped(args[0], _by_rows(recorder.record_input), args[0].detach()), *args[1:])

        def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            return self._tapped(output, _by_rows(recorder.record_output), args[0].detach())

        hooks.callback(layer.register_forward_pre_hook(before).remove)
        hooks.callback(layer.register_forward_hook(after).remove)

    def _round(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        is_rounded = isinstance(output, Tensor) and output.is_floating_point()
        if not is_rounded or not torch.is_grad_enabled():
            return None
        return self._tapped(output, self._record_rounding, output.detach())

    def _record_rounding(self, gradient: Tensor, value: Tensor) -> None:
        """Adds the mean squared effect of rounding a result to BF16: a twelfth of the squared step."""
        exponent = torch.frexp(value.float().abs().clamp(min=SMALLEST_NORMAL))[1] - 1
        steps = torch.ldexp(gradient.float() * BF16_STEP, exponent)
        self._rounding += float(steps.square_().sum(dtype=torch.float64)) / 12

    def _tapped(self, value: Tensor, record: Record, beside: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(value, self._anchor, record, beside)  # type: ignore[no-untyped-call]  # torch's
        return tapped


def _nothing() -> None:
    return None


def _by_rows(record: Callable[[Tensor, Tensor], None]) -> Record:
    """A function of tensors [..., features] in place of one of rows [tokens, features]."""

    def flattened(gradient: Tensor, inputs: Tensor) -> None:
        record(gradient.reshape(-1, gradient.shape[-1]), inputs.reshape(-1, inputs.shape[-1]))

    return flattened


def _rounding_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose results are rounded: those that compute, and blocks, which add to the residual stream."""
    blocks = {block for each in model.modules() if isinstance(each, nn.ModuleList) for block in each}
    for module in model.modules():
        is_leaf = next(module.children(), None) is None and not isinstance(module, nn.Dropout | nn.Identity)
        if is_leaf or module in blocks:
            yield module


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Lets no parameter ask for gradients, which would be as large as the model."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _can_checkpoint(model: nn.Module) -> bool:
    """Whether it is a model of diffusers that keeps only the inputs of blocks if it is told to."""
    return bool(getattr(model, "_supports_gradient_checkpointing", False)) and hasattr(model, "config_name")


@contextmanager
def _checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Keeps only the inputs of each block of a model of diffusers, if it supports that."""
    if not _can_checkpoint(model) or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()  # type: ignore[operator]  # of diffusers
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()  # type: ignore[operator]  # of diffusers


@contextmanager
def _checkpointed(model: nn.Module, before: Callable[[], None]) -> Iterator[None]:
    """Keeps only the inputs of each call of a model; `before` is called before it computes."""
    forward, is_patched = model.forward, "forward" in vars(model)

    def computed(*args: Any, **kwargs: Any) -> Any:
        before()
        return forward(*args, **kwargs)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(computed, *args, use_reentrant=False, **kwargs)

    model.forward = checkpointed  # hooks of the module still run around it
    try:
        yield
    finally:
        if is_patched:
            model.forward = forward
        else:
            del model.forward
