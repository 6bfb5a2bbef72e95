"""TeaCache: reuses what a transformer's blocks added, in denoising steps whose input has changed little.

The first block's modulated input is what enters its attention. Its relative L1 distance from that of the step before is
rescaled by a polynomial of the model, and summed. As long as the sum is below `rel_l1_thresh`, all blocks are skipped,
and the difference that they made in the last full step is added instead. So `rel_l1_thresh` means what it means in
vLLM-Omni, whose polynomials these are (`diffusion/cache/teacache/config.py` of 0.32).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from omni_convert.formats.errors import RecipeError

__all__ = ["MODELS", "TeaCache"]

HOOK = "omni_convert_tea_cache"
#: Keeps the denominator of a distance from zero.
SMALL = 1e-8


@dataclass(frozen=True)
class ReadableModel:
    """Where the blocks of a transformer are, and how its distances become changes of its output.

    Attributes:
        coefficients: of the polynomial that rescales a distance, the highest power first
        lists: attributes with the blocks, in the order in which they run
        attention: attribute of a block whose input is the modulated one
    """

    coefficients: tuple[float, ...]
    lists: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")
    attention: str = "attn"


FLUX_1 = ReadableModel((4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01))
QWEN_IMAGE = ReadableModel((-4.5e02, 2.8e02, -4.5e01, 3.2e00, -2.0e-02))
#: Class of the pipeline, or else of its transformer → its blocks. As in vLLM-Omni, FLUX.2-klein borrows the polynomial
#: of FLUX.1, and FLUX.2-dev that of Qwen-Image.
MODELS = {
    "ZImageTransformer2DModel": ReadableModel(
        (-7.54613422e01, -9.23596156e01, 5.75318402e01, -3.76790311e00, 2.27176809e-01), ("layers",), "attention"
    ),
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "FluxTransformer2DModel": FLUX_1,
    "Flux2KleinPipeline": FLUX_1,
    "Flux2Transformer2DModel": QWEN_IMAGE,
    "LongCatImageTransformer2DModel": ReadableModel((652.5980, -424.1615, 84.5526, -4.5923, 0.1694)),
}


class _InputUnchangedError(Exception):
    """Leaves the first block before its attention; the hook around the block catches it."""


@dataclass
class _Branch:
    """One of the calls that a step makes: with the prompt, or with the negative prompt.

    Attributes:
        modulated: the last step's modulated input, [batch, tokens, channels]
        residual: what the blocks added to the image's tokens in the last full step, [batch, tokens, channels]
        distance: sum of the rescaled distances since then
    """

    modulated: torch.Tensor
    residual: torch.Tensor | None = None
    distance: float = 0.0


class TeaCache:
    """The cache of one pipeline.

    Attributes:
        computed, reused: number of the transformer's calls in which its blocks ran, or were skipped

    Raises:
        RecipeError: the blocks of the pipeline's transformer cannot be read.
    """

    def __init__(
        self, pipe: DiffusionPipeline, threshold: float = 0.2, coefficients: Sequence[float] | None = None
    ) -> None:
        transformer, model = _readable(pipe)
        self.computed = self.reused = 0
        self._pipe = pipe
        self._threshold = threshold
        self._coefficients = tuple(coefficients or model.coefficients)
        self._blocks: list[nn.Module] = [block for name in model.lists for block in getattr(transformer, name, ())]
        self._branches: list[_Branch] = []
        self._timesteps: object = None
        self._step: object = None
        self._call = -1
        self._is_reusing = False
        self._input: torch.Tensor | None = None
        for place, block in enumerate(self._blocks):
            hook = _BlockHook(self, is_first=place == 0, is_last=place == len(self._blocks) - 1)
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, HOOK)
        attention = getattr(self._blocks[0], model.attention)
        self._handle = attention.register_forward_pre_hook(self._look, with_kwargs=True)

    def remove(self) -> None:
        """Restores the transformer."""
        self._handle.remove()
        for block in self._blocks:
            HookRegistry.check_if_exists_or_initialize(block).remove_hook(HOOK, recurse=False)
        self._branches = []

    @property
    def is_reusing(self) -> bool:
        """Whether the blocks of the current call are skipped."""
        return self._is_reusing

    def start(self, hidden: torch.Tensor) -> None:
        """Begins a call of the transformer, whose first block gets the image's tokens `hidden`."""
        scheduler = self._pipe.scheduler
        step = getattr(scheduler, "step_index", None)
        if scheduler.timesteps is not self._timesteps:  # another image; the tensor is made anew for each
            self._timesteps, self._branches, self._call = scheduler.timesteps, [], 0
        else:
            self._call = self._call + 1 if step == self._step else 0
        self._step, self._is_reusing, self._input = step, False, hidden

    def reuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """The image's tokens as the blocks would leave them."""
        residual = self._branches[self._call].residual
        assert residual is not None
        self._is_reusing = True
        self.reused += 1
        return hidden + residual

    def finish(self, hidden: torch.Tensor) -> None:
        """Records what the blocks added; `hidden` may have the text's tokens in front of the image's."""
        assert self._input is not None
        self.computed += 1
        self._branches[self._call].residual = hidden[:, -self._input.shape[1] :] - self._input

    def _look(self, _attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Decides about a call when the modulated input is known; raises `_InputUnchangedError` to skip the blocks."""
        modulated = (args[0] if args else kwargs["hidden_states"]).detach()
        if self._call == len(self._branches):
            self._branches.append(_Branch(modulated))
            return
        branch = self._branches[self._call]
        before, branch.modulated = branch.modulated, modulated
        if branch.residual is None or before.shape != modulated.shape:
            branch.distance, branch.residual = 0.0, None
            return
        branch.distance += abs(self._rescaled(_relative_distance(modulated, before)))
        if branch.distance < self._threshold:
            raise _InputUnchangedError
        branch.distance = 0.0

    def _rescaled(self, distance: float) -> float:
        value = 0.0
        for coefficient in self._coefficients:
            value = value * distance + coefficient
        return value


class _BlockHook(ModelHook):  # type: ignore[misc]  # diffusers has no types
    """Runs a block, or passes its input on while the cache is used."""

    fn_ref: Any

    def __init__(self, cache: TeaCache, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self._cache = cache
        self._is_first = is_first
        self._is_last = is_last

    def new_forward(self, _block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        encoder: torch.Tensor | None = kwargs.get("encoder_hidden_states")
        if self._is_first:
            self._cache.start(hidden)
        elif self._cache.is_reusing:
            return _as_output(hidden, encoder)
        forward: Callable[..., Any] = self.fn_ref.original_forward
        try:
            output = forward(*args, **kwargs)
        except _InputUnchangedError:
            return _as_output(self._cache.reuse(hidden), encoder)
        if self._is_last:
            self._cache.finish(output[1] if isinstance(output, tuple) else output)
        return output


def _as_output(hidden: torch.Tensor, encoder: torch.Tensor | None) -> Any:
    """The result of a block: its two streams if it gets two, the text first."""
    return hidden if encoder is None else (encoder, hidden)


def _relative_distance(current: torch.Tensor, before: torch.Tensor) -> float:
    difference = (current.float() - before.float()).abs().mean()
    return float(difference / (before.float().abs().mean() + SMALL))


def _readable(pipe: DiffusionPipeline) -> tuple[nn.Module, ReadableModel]:
    transformer = getattr(pipe, "transformer", None)
    names = (type(pipe).__name__, type(transformer).__name__)
    model = next((MODELS[name] for name in names if name in MODELS), None)
    if transformer is None or model is None:
        raise RecipeError(
            f"cache_backend: found tea_cache for {names[0]}, whose blocks it cannot read, expected a pipeline with one "
            f"of {', '.join(name for name in MODELS if name.endswith('Model'))}; use first_block_cache or cache_dit"
        )
    if getattr(pipe, "controlnet", None) is not None or "KV" in names[0]:
        raise RecipeError(
            f"cache_backend: found tea_cache for {names[0]}, which changes tokens between blocks; omit it"
        )
    return transformer, model
