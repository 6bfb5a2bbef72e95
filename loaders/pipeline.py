"""From a folder or a Hub repository to a running pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors import SafetensorError
from torch import nn

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.fp8_storage import Fp8Storage
from omni_convert.loaders.kernels.kernel import Activations
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig
from omni_convert.loaders.loading.gguf import load_gguf
from omni_convert.loaders.loading.pipeline_files import INDEX, find_gguf_components, require_pipeline, shared_readers
from omni_convert.loaders.loading.refusal import refuse_undeclared
from omni_convert.loaders.loading.transformers_quantizer import TransformersConfig
from omni_convert.loaders.report import kernel_report, require_scaled_gemm
from omni_convert.loaders.request.spec import (
    ComponentQuantizationConfig,
    QuantizationSpec,
    build_quant_config,
    resolve_component_quant_config,
)

__all__ = ["load_pipeline"]

logger = logging.getLogger(__name__)

CONFIG_CLASSES: dict[str, type[DiffusersConfig | TransformersConfig]] = {
    "diffusers": DiffusersConfig,
    "transformers": TransformersConfig,
}


def load_pipeline(
    model: str | Path,
    device: str | torch.device | None = None,
    torch_dtype: torch.dtype = torch.bfloat16,
    quantization: QuantizationSpec = None,
    strict: bool = False,
    activations: Activations = "quantized",
    **kwargs: Any,
) -> DiffusionPipeline:
    """Loads a pipeline: a quantized one as it is, or any other, quantizing it on the way if asked to.

    Args:
        model: a folder or a Hub repository; its denoising models may be in GGUF, which diffusers runs
        device: where to put it; where `from_pretrained` leaves it, if None
        torch_dtype: dtype of everything that is not quantized
        quantization: what `build_quant_config` takes. One method means the denoising model(s); a text encoder is
            quantized if it is named. Layers are quantized one by one as they are read.
        strict: run a scaled GEMM in every quantized layer, even where decoding is faster (FP8 on a CPU), or refuse
            (see `kernel_report`)
        activations: `quantized` as at the serving runtime, or `bf16` to quantize weights only
        kwargs: passed to `DiffusionPipeline.from_pretrained`

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or contradicts its config.
        RecipeError: the request does not fit the model.
        KernelError: `strict`, and a layer has no scaled GEMM on this device.
    """
    config = build_quant_config(quantization)
    try:
        require_pipeline(model, _hub_options(kwargs))
        requested = _requested_configs(str(model), config, kwargs)
        kwargs = _load_gguf_components(model, torch_dtype, requested, kwargs) | kwargs
        with shared_readers():
            _check_files(model, kwargs)
            pipeline = DiffusionPipeline.from_pretrained(
                str(model), dtype=torch_dtype, **_quantization_argument(requested), **kwargs
            )
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: diffusers does not know a config
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise CheckpointError(f"{model}: cannot be loaded ({reason}); download or convert it again") from error
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    _refuse_other_method(requested, modules)
    if device is not None:
        pipeline.to(device)
    if activations != "quantized":
        for layer in _quantized_layers(modules.values()):
            layer.activations = activations
    if strict:
        for layer in _quantized_layers(modules.values()):
            layer.prefers_scaled_gemm = True
        require_scaled_gemm(kernel_report(pipeline))
    return pipeline


def _load_gguf_components(
    model: str | Path, torch_dtype: torch.dtype, requested: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The denoising models that are in GGUF; diffusers' pipelines do not look for these files."""
    folders = find_gguf_components(model, _hub_options(kwargs))
    index = read_json(folders[0].parent / INDEX) if folders else {}
    listed = {folder.name: folder for folder in folders if isinstance(index.get(folder.name), list)}
    loaded = {name: load_gguf(folder, index[name][1], torch_dtype) for name, folder in listed.items()}
    for name in loaded.keys() & requested.keys():
        raise RecipeError(
            f"quantization: {name} is stored in GGUF, found a request for {requested[name].meaning.method}; leave "
            "quantization out, or start from the unquantized model"
        )
    return loaded


def _check_files(model: str | Path, kwargs: dict[str, Any]) -> None:
    """Looks at the files on the disk before they are loaded; what is on the Hub, diffusers fetches for that."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(DiffusionPipeline.download(str(model), **kwargs))
        kwargs.pop("force_download", None)  # once is enough
    if kwargs.get("use_safetensors") is not False:
        refuse_undeclared(folder, kwargs.keys(), kwargs.get("variant"))


def _requested_configs(
    model: str, config: QuantizationConfig | ComponentQuantizationConfig | None, kwargs: Mapping[str, Any]
) -> dict[str, DiffusersConfig | TransformersConfig]:
    """Component to the configuration in the wrapping that its library wants."""
    if config is None:
        return {}
    index = DiffusionPipeline.load_config(model, **_hub_options(kwargs))
    libraries = {name: entry[0] for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    _refuse_unknown_components(config, libraries)
    requested = {}
    for name, library in libraries.items():
        meaning = _config_for(config, name)
        if meaning is None:
            continue
        is_storage = meaning.method == Fp8Storage.method
        if library not in CONFIG_CLASSES or ("vae" in name and not is_storage):
            raise RecipeError(f"quantization: {name} cannot be quantized to {meaning.method}, use None or fp8_storage")
        requested[name] = CONFIG_CLASSES[library].of(meaning)
    return requested


def _hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}


def _config_for(config: QuantizationConfig | ComponentQuantizationConfig, name: str) -> QuantizationConfig | None:
    """A config that names no component, and the default of one that does, mean the denoising models."""
    is_named = isinstance(config, ComponentQuantizationConfig) and any(map(name.startswith, config.component_configs))
    return resolve_component_quant_config(config, name) if is_named or name in DENOISERS else None


def _refuse_unknown_components(
    config: QuantizationConfig | ComponentQuantizationConfig, components: Iterable[str]
) -> None:
    if isinstance(config, ComponentQuantizationConfig):
        for key, value in config.component_configs.items():
            if value is not None and not any(name.startswith(key) for name in components):
                raise RecipeError(f"quantization: found component '{key}', expected one of {', '.join(components)}")


def _quantization_argument(requested: Mapping[str, Any]) -> dict[str, Any]:
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=dict(requested))} if requested else {}


def _refuse_other_method(requested: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """A checkpoint that is quantized already stays so; asking it to be something else is a mistake."""
    for name, config in requested.items():
        quantizer = getattr(modules.get(name), "hf_quantizer", None)
        if quantizer is None or not quantizer.pre_quantized:
            continue
        found = getattr(getattr(quantizer, "meaning", None), "method", quantizer.quantization_config.quant_method)
        if found != config.meaning.method:
            raise RecipeError(
                f"quantization: {name} is quantized as {found} already, found a request for {config.meaning.method}; "
                "leave quantization out, or start from the unquantized model"
            )
        logger.info("%s is quantized as %s already", name, found)


def _quantized_layers(modules: Iterable[nn.Module]) -> Iterator[QuantizedLinear]:
    for module in modules:
        yield from (layer for layer in module.modules() if isinstance(layer, QuantizedLinear))
