"""Builds the models of a pipeline without their weights, which stay in their files until a part of a model runs.

The libraries would read every weight: what they cast, they copy. So a model is built from its config, as they build it,
and each of its tensors is matched with one of the files.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import no_init_weights
from torch import nn
from transformers.core_model_loading import build_glob_alternation

from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.dialects.config_block import read_block
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.schemes.fp8_storage import Fp8Storage
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig, DiffusersOmniQuantizer
from omni_convert.loaders.loading.pipeline_files import INDEX, loaded_files, open_weights
from omni_convert.loaders.loading.transformers_quantizer import names_in_model
from omni_convert.loaders.memory.budget import MemoryChoice
from omni_convert.loaders.memory.mapped_file import MappedFile
from omni_convert.loaders.memory.streaming import StoredTensor, Streamer

__all__ = [
    "PipelineStream",
    "attach",
    "bind",
    "empty_model_of_diffusers",
    "empty_model_of_transformers",
    "memory_bytes",
    "streamer_of",
]

CONFIG = "config.json"
FULL = "use memory='full' or 'auto' (--memory)"


@dataclass(frozen=True)
class PipelineStream:
    """A pipeline whose denoising models and text encoders may be streamed; it loads its other components itself.

    Attributes:
        folder: that of the pipeline
        dtype: in which the models compute
        arguments: of `from_pretrained`, with components that the caller has already
    """

    folder: Path
    device: torch.device
    dtype: torch.dtype
    arguments: Mapping[str, Any]

    @cached_property
    def _components(self) -> dict[str, tuple[str, str]]:
        """Component → library and class of those that may be streamed."""
        return {
            name: (entry[0], entry[1])
            for name, entry in read_json(self.folder / INDEX).items()
            if name not in self.arguments and isinstance(entry, list) and _is_streamable(name, *entry[:2])
        }

    def open(self, memory: str, refusal: str | None) -> tuple[Streamer | None, dict[str, nn.Module]]:
        """The streamer and its models by component; None and no models if the pipeline is loaded whole.

        Args:
            memory: as in `MemoryChoice`
            refusal: why the pipeline cannot be streamed, whatever its files hold

        Raises:
            RecipeError: streaming is asked for and impossible.
            CheckpointError: the files of a component lack a tensor, or hold one of another shape.
        """
        choice = MemoryChoice.parse(memory)
        if choice.kind == "full" or not self._is_wanted(choice, refusal):
            return None, {}
        streamer = Streamer(self.device, choice.limit)
        return streamer, {name: self._stream(name, streamer) for name in self._components}

    def _is_wanted(self, choice: MemoryChoice, refusal: str | None) -> bool:
        refusal = refusal or next(filter(None, map(self._refusal, self._components)), None)
        if refusal is not None:
            if choice.kind == "stream":
                raise RecipeError(f"memory: found 'stream' for {self.folder}, which {refusal}; {FULL}")
            return False
        return choice.streams(
            {name: memory_bytes(self._files(name), self.dtype) for name in self._components}, self.device
        )

    def _refusal(self, name: str) -> str | None:
        block = self._block(name)
        if block and (self._components[name][0] != "diffusers" or not _is_read(block)):
            return f"holds '{name}' quantized in a form that is not streamed"
        return None if self._files(name) else f"holds '{name}' in other files than safetensors"

    def _block(self, name: str) -> dict[str, Any]:
        """The config block of a component; empty if it is not quantized."""
        config = self.folder / name / CONFIG
        return dict(read_json(config).get("quantization_config") or {}) if config.is_file() else {}

    def _files(self, name: str) -> list[Path]:
        return loaded_files(self.folder / name, self._components[name][0], self.arguments.get("variant"))

    def _stream(self, name: str, streamer: Streamer) -> nn.Module:
        library, class_name = self._components[name]
        empty_model = empty_model_of_diffusers if library == "diffusers" else empty_model_of_transformers
        model_class = getattr(importlib.import_module(library), class_name)
        model, dtypes = empty_model(model_class, self.folder / name, self.dtype)
        files, block = self._files(name), self._block(name)
        if not block:
            streamer.add(name, model, bind(model, dtypes, files), repeats=name in DENOISERS)
            return model
        quantizer = DiffusersOmniQuantizer(DiffusersConfig(block))
        quantizer.maybe_update_loaded_keys([], [str(file) for file in files])
        quantizer.preprocess_model(model)
        plain = {name: dtype for name, dtype in dtypes.items() if name not in quantizer.loaded}
        streamer.add(name, model, bind(model, plain, files), repeats=name in DENOISERS)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
        return model


def memory_bytes(files: Sequence[Path], dtype: torch.dtype) -> int:
    """Bytes that the weights in some files take in memory, if floats become this dtype."""
    with open_weights(files) as checkpoint:
        return sum(
            spec.nbytes // spec.dtype.itemsize * (dtype if _is_plain(spec.dtype) else spec.dtype).itemsize
            for spec in checkpoint.values()
        )


def _is_plain(dtype: torch.dtype) -> bool:
    """Whether it is cast on loading; codes are not."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _is_read(block: Mapping[str, Any]) -> bool:
    """Whether our layers hold the tensors of a quantized model, and hold them as they are in the file or repacked."""
    try:
        return read_block(block).method != Fp8Storage.method
    except CheckpointError:
        return False


def attach(pipeline: DiffusionPipeline, streamer: Streamer) -> None:
    """Makes the other models of a pipeline run when the streamed ones are given up."""
    for name, model in pipeline.components.items():
        if isinstance(model, nn.Module) and name not in streamer.read_bytes:
            streamer.watch(name, model.to(streamer.device))
    pipeline.streamer = streamer


def streamer_of(pipeline: DiffusionPipeline) -> Streamer | None:
    """The streamer of a pipeline; None if it is loaded whole."""
    found: Streamer | None = getattr(pipeline, "streamer", None)
    return found


def _is_streamable(name: str, library: str | None, class_name: str | None) -> bool:
    if library == "diffusers":
        return name in DENOISERS
    found = getattr(transformers, class_name or "", None) if library == "transformers" else None
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def empty_model_of_diffusers(
    model_class: Any, folder: Path, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """A model with parameters on the meta device, and the dtype of each tensor; built as `from_pretrained` does."""
    kept = model_class._keep_in_fp32_modules or []  # noqa: SLF001  # diffusers has no public name for it
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), accelerate.init_empty_weights():
            model = model_class.from_config(model_class.load_config(folder)).eval()
    finally:
        torch.set_default_dtype(default)
    model.register_to_config(_name_or_path=str(folder))
    return model, {
        name: torch.float32 if set(kept) & set(name.split(".")) else dtype
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def empty_model_of_transformers(
    model_class: Any, folder: Path, dtype: torch.dtype
) -> tuple[Any, dict[str, torch.dtype]]:
    """The same for a model of transformers."""
    config = model_class.config_class.from_pretrained(folder)
    with accelerate.init_empty_weights():
        model = model_class._from_config(config, dtype=dtype).eval()  # noqa: SLF001  # has no public name
    model.tie_weights()  # again: accelerate has made a parameter of its own for each name
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001  # as above
    pattern = build_glob_alternation(list(plan))[0] if plan else None
    return model, {
        name: torch.float32 if pattern is not None and pattern.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def bind(model: nn.Module, dtypes: Mapping[str, torch.dtype], files: Sequence[Path]) -> list[StoredTensor]:
    """Matches the tensors of a model with those of its files.

    Args:
        model: with parameters on the meta device
        dtypes: in which the model computes with its tensors of floats, by name

    Raises:
        CheckpointError: the files hold no such tensor, or one of another shape.
    """
    mapped = [MappedFile(path) for path in files]
    owners = {name: file for file in mapped for name in file.specs}
    specs = {name: file.specs[name] for name, file in owners.items()}
    is_theirs = isinstance(model, transformers.PreTrainedModel)
    stored = names_in_model(specs, model, merges=False) if is_theirs else specs
    where = files[0].parent
    bound = []
    for names, tensor in _unique_tensors(model):
        found = next((stored[name] for name in names if name in stored), None)
        if found is None:
            if tensor.is_meta:
                raise CheckpointError(
                    f"{where}: found no '{names[0]}' of {type(model).__name__} under one name, which streaming needs; "
                    f"{FULL}"
                )
            continue
        if found.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{where}: {found.name} is {list(found.shape)}, expected {list(tensor.shape)} for "
                f"{type(model).__name__}; download it again"
            )
        places = tuple((model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names)
        bound.append(StoredTensor(places, owners[found.name], found.name, dtypes.get(names[0], tensor.dtype)))
    return bound


def _unique_tensors(model: nn.Module) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Every parameter and buffer, with all of its names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return ((names[key], tensors[key]) for key in names)
