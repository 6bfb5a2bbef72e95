"""Records what goes into the linears of a stage's language model, in a repository of transformers.

Prompts are run once each: the inputs of all layers are there after one pass. Those with images or sounds go through the
repository's processor and the towers of the stage, whose outputs the language model reads beside the text. Transformers
keeps the experts of a block in two stacked tensors; while recording, each expert is linears again, which share the
memory of the stacks.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omni_convert.convert.calibration.input_observer import InputObserver
from omni_convert.convert.calibration.lockstep import run_jobs
from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.pipeline_recorder import Recording, recording_identity
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.device import resolve_device
from omni_convert.convert.progress_bar import progress_bar
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CalibrationError, CheckpointError
from omni_convert.formats.families.family import Family
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.loaders.loading.packages import missing_package
from omni_convert.loaders.loading.pipeline_files import loaded_files, open_weights
from omni_convert.loaders.memory.budget import MemoryChoice
from omni_convert.loaders.memory.streaming import Streamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.feature_extraction_utils import BatchFeature

__all__ = ["StageRecorder", "split_experts"]


@dataclass(frozen=True)
class StageRecorder:
    """A loaded stage, and how to run it.

    Attributes:
        root: holds the language model so that its modules are called as in the checkpoint
        whole: the stage with its towers
        processor: makes inputs of images and sounds; None if the prompts have none
        fingerprint: `Checkpoint.fingerprint()` of the repository
        streamer: what brings the model's blocks when they run; None if it is loaded whole
        scratch: folder for second moments if the model is streamed
    """

    family: Family
    root: nn.Module
    whole: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    fingerprint: str
    with_moments: bool = False
    streamer: Streamer | None = None
    scratch: Path | None = None

    @classmethod
    def load(
        cls,
        source: Source,
        recipe: Recipe,
        weights: Mapping[str, Checkpoint] | None = None,
        *,
        is_text: bool = True,
        with_moments: bool = False,
        scratch: Path | None = None,
    ) -> StageRecorder:
        """Loads the stage of a repository.

        Args:
            weights: {"": weights of the repository}; None to open them
            is_text: no prompt has an image or a sound
            scratch: see the class

        Raises:
            CalibrationError: no class of transformers runs the stage, or the repository has no tokenizer, or no
                processor of images and sounds.
            CheckpointError: tensors of the stage are missing, or transformers cannot load it.
            RecipeError: a package that the processor needs is not installed.
        """
        folder = ComponentFolder(source, "")
        assert folder.stage is not None, "the caller knows that there is one"
        fingerprint = (weights[""] if weights else folder.checkpoint()).fingerprint()
        device, model_class = resolve_device(recipe.device), _class_of(source, folder.family)
        tokenizer, processor = _loaded_tokenizer(source), None if is_text else _loaded_processor(source.path)
        streamer = _streamer(source, recipe, device)
        whole = (
            _loaded_stage(source, model_class) if streamer is None else _streamed_stage(source, model_class, streamer)
        )
        model = whole.get_decoder()
        if streamer is None:
            split_experts((model if is_text else whole).to(device))
        root, stage = nn.Module(), nn.Module()
        root.add_module(folder.stage.prefix.rstrip("."), stage)
        stage.add_module("model", model)
        return cls(folder.family, root, whole, tokenizer, processor, fingerprint, with_moments, streamer, scratch)

    def record(self, prompts: Sequence[Prompt], *, progress: bool = False) -> Recording:
        """Runs the language model over prompts.

        Args:
            progress: show a bar, if standard error is a terminal

        Raises:
            CalibrationError: there are no prompts; the processor cannot read an image or a sound; or an input is NaN or
                infinite.
            RecipeError: a package that reads sounds is not installed.
        """
        if not prompts:
            raise CalibrationError("calibration: found no prompts, expected at least one")
        observer = InputObserver(
            {"": self.root},
            family=self.family,
            with_moments=self.with_moments,
            scratch=None if self.streamer is None else self.scratch,
        )
        if self.streamer is not None:
            self.streamer.at_give_up = lambda part: observer.rest(part.module)
        with observer, progress_bar("calibrating", len(prompts), "prompt", hidden=not progress, stays=False) as advance:

            def run(prompt: Prompt) -> None:
                observer.start(prompt)
                self._run(prompt)
                advance(1)

            run_jobs(self.streamer, [partial(run, prompt) for prompt in prompts])
        identity = recording_identity(prompts, {}, {"": self.fingerprint})
        statistics = Statistics(identity, observer.statistics())
        moments = Moments.recorded(identity, observer.moments()) if self.with_moments else None
        return Recording(statistics, moments, observer.growth())

    @property
    def _device(self) -> torch.device:
        return self.streamer.device if self.streamer is not None else self.whole.get_decoder().device

    @torch.no_grad()
    def _run(self, prompt: Prompt) -> None:
        if prompt.is_text:
            self.whole.get_decoder()(input_ids=self._tokens(prompt.text).to(self._device), use_cache=False)
        else:
            assert self.processor is not None, "the stage was loaded for such prompts"
            inputs = _processed(prompt, self.processor).to(self._device, self.whole.dtype)
            self.whole(**inputs, use_cache=False)

    def _tokens(self, text: str) -> Tensor:
        """Numbers of the tokens of a text, [1, tokens]."""
        if self.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return tokens


def _class_of(source: Source, family: Family) -> Any:
    """The class of transformers that runs a family's stage."""
    import transformers

    stage = family.stage
    assert stage is not None
    model_class = getattr(transformers, stage.transformers_class, None) if stage.transformers_class else None
    if model_class is None:
        version = importlib.metadata.version("transformers")
        raise CalibrationError(
            f"{source.path}: found {family.name}, for which neither diffusers nor transformers {version} has a class, "
            "so that no prompt can be run; convert it without --calib: activations are then scaled at run time, or "
            "stay in BF16"
        )
    return model_class


def _streamer(source: Source, recipe: Recipe, device: torch.device) -> Streamer | None:
    """The streamer of the model; None if it is loaded whole."""
    choice = MemoryChoice.parse(recipe.memory)
    weights = sum(file.stat().st_size for file in loaded_files(source.path, "transformers"))
    return Streamer(device, choice.limit) if choice.streams({"the language model": weights}, device) else None


def _streamed_stage(source: Source, model_class: Any, streamer: Streamer) -> PreTrainedModel:
    """A model with experts that are linears, whose weights stay in their files."""
    from omni_convert.loaders.loading.streamed import bind, empty_model_of_transformers  # seconds of imports

    files = loaded_files(source.path, "transformers")
    with open_weights(files) as checkpoint:
        stored_dtype = next(spec.dtype for spec in checkpoint.values() if spec.dtype.is_floating_point)
    dtype = model_class.config_class.from_pretrained(source.path).dtype or stored_dtype
    model, dtypes = empty_model_of_transformers(model_class, source.path, dtype)
    split_experts(model)
    streamer.add("", model, bind(model, dtypes, files), repeats=False)
    whole: PreTrainedModel = model
    return whole


def _loaded_stage(source: Source, model_class: Any) -> PreTrainedModel:
    try:
        model, loading = model_class.from_pretrained(
            source.path, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source.path}: transformers cannot load it as {model_class.__name__} ({reason})"
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"{source.path}: found no '{missing[0]}' of {model_class.__name__}; download it again")
    loaded: PreTrainedModel = model.eval()
    return loaded


def _loaded_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{source.path}: found no tokenizer that transformers loads ({reason}), expected one beside the weights"
        ) from None
    return tokenizer


def _loaded_processor(folder: Path) -> ProcessorMixin:
    """What makes inputs of images and sounds; see `StageRecorder.load` for the errors."""
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise missing_package(str(folder), error) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_processor(folder, " ".join(str(error).split())[:200]) from None
    if not isinstance(processor, ProcessorMixin):  # a tokenizer where there is no more
        raise _no_processor(folder, type(processor).__name__)
    return processor


def _no_processor(folder: Path, reason: str) -> CalibrationError:
    return CalibrationError(
        f"{folder}: found no processor of images and sounds that transformers loads ({reason}), expected one beside "
        "the weights; leave them out of the prompts"
    )


def _processed(prompt: Prompt, processor: ProcessorMixin) -> BatchFeature:
    """The inputs of the stage for a prompt with an image or a sound; see `StageRecorder.record` for the errors."""
    from diffusers.utils import load_image

    content: list[dict[str, Any]] = [{"type": "text", "text": prompt.text}]
    if prompt.audio is not None:
        content.insert(0, {"type": "audio", "audio": str(prompt.audio)})
    if prompt.image is not None:
        content.insert(0, {"type": "image", "image": load_image(str(prompt.image))})
    messages = [{"role": "user", "content": content}]
    try:
        inputs: BatchFeature = processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    except ImportError as error:
        raise missing_package(type(processor).__name__, error) from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"'{prompt.text:.40}': {type(processor).__name__} cannot read its image or sound ({reason})"
        ) from None
    return inputs


class _Expert(nn.Module):
    """One expert, whose weights are parts of stacked tensors."""

    def __init__(self, gate_up: Tensor, down: Tensor, activate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))
        self._activate = activate

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.down_proj(self._activate(self.gate_proj(inputs)) * self.up_proj(inputs))
        return outputs


class _Experts(nn.ModuleDict):
    """The experts of a block, called by their numbers as in the checkpoint; computes what the stacks do."""

    def __init__(self, stacks: Any) -> None:
        pairs = zip(stacks.gate_up_proj.detach(), stacks.down_proj.detach(), strict=True)
        super().__init__({str(number): _Expert(*pair, stacks.act_fn) for number, pair in enumerate(pairs)})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mixes the experts of each token.

        Args:
            hidden_states: [tokens, hidden]
            top_k_index: numbers of each token's experts, [tokens, k]
            top_k_weights: their weights, [tokens, k]

        Returns:
            [tokens, hidden]
        """
        mixed = torch.zeros_like(hidden_states)
        for number in sorted({*top_k_index.flatten().tolist()}):
            tokens, places = torch.where(top_k_index == number)
            outputs = self[str(number)](hidden_states[tokens]) * top_k_weights[tokens, places, None]
            mixed.index_add_(0, tokens, outputs.to(mixed.dtype))
        return mixed


def split_experts(model: nn.Module) -> None:
    """Replaces stacked experts of a model by linears that share their memory, in place."""
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and module.gate_up_proj.dim() == 3
    ]
    for name, module in stacks:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _Experts(module))


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
