"""From a folder or a Hub repository to a running pipeline."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors import SafetensorError
from torch import nn

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.schemes.fp8_storage import Fp8Storage
from omni_convert.formats.schemes.gguf import Gguf
from omni_convert.loaders.kernels.kernel import Activations
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig
from omni_convert.loaders.loading.gguf import load_gguf
from omni_convert.loaders.loading.hub import fetch_gguf_file
from omni_convert.loaders.loading.opened_model import load_opened_models
from omni_convert.loaders.loading.packages import missing_package
from omni_convert.loaders.loading.pipeline_files import find_gguf_components, require_pipeline, shared_readers
from omni_convert.loaders.loading.refusal import refuse_undeclared
from omni_convert.loaders.loading.streamed import PipelineStream, attach
from omni_convert.loaders.loading.transformers_quantizer import TransformersConfig
from omni_convert.loaders.memory.streaming import Streamer
from omni_convert.loaders.report import kernel_report, require_scaled_gemm
from omni_convert.loaders.request.spec import (
    CalibratedConfig,
    ComponentQuantizationConfig,
    GgufModel,
    QuantizationSpec,
    build_quant_config,
    resolve_component_quant_config,
)
from omni_convert.loaders.step_cache import enable_step_cache

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
    cache_backend: str | None = None,
    cache_config: Mapping[str, Any] | None = None,
    memory: str = "full",
    **kwargs: Any,
) -> DiffusionPipeline:
    """Loads a pipeline. A quantized one is loaded as it is; any other is quantized while it loads, if asked to.

    Args:
        model: a folder or a Hub repository; its denoising models may be in GGUF
        device: where to put it; None leaves it where `from_pretrained` puts it
        torch_dtype: dtype of everything that is not quantized
        quantization: a spec that `build_quant_config` accepts. One method means the denoising model(s); a text encoder
            is quantized if it is named. Layers are quantized one by one as they are read. With `input_scales`, a
            statistics file, activations are static. `gguf` loads a denoising model from the file `gguf_model` instead.
        strict: run a scaled GEMM in every quantized layer, even where decoding is faster (FP8 on a CPU), or refuse
            (see `kernel_report`)
        activations: `quantized`, as the serving runtime does, or `bf16` to quantize weights only
        cache_backend, cache_config: a step cache and its settings, as `enable_step_cache` takes them
        memory: `full` loads all weights, `stream` leaves those of denoising models and text encoders in their files and
            brings each block when it runs, `auto` streams what does not fit. `stream:12` takes at most about 12 GB,
            where several prompts share the blocks. GGUF, FP8 storage, ComfyUI's files, AutoRound's MX and NVFP4, and
            quantized text encoders are not streamed.
        kwargs: passed to `DiffusionPipeline.from_pretrained`

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or contradicts its config.
        RecipeError: the request does not fit the model, or the model needs a package that is not installed.
        KernelError: `strict`, and a layer has no scaled GEMM on this device.
    """
    hub_options = _hub_options(kwargs)
    if cache_config is not None and cache_backend is None:
        raise RecipeError("cache_config: found without a cache_backend, which it configures")
    try:
        require_pipeline(model, hub_options)
        requested, in_gguf = _requested_configs(str(model), quantization, hub_options)
        kwargs = _load_gguf_components(model, torch_dtype, requested, in_gguf, hub_options) | kwargs
        with shared_readers():
            folder = _local_folder(model, kwargs)
            kwargs |= _models_read_by_layer(folder, torch_dtype, kwargs, requested)
            stream = PipelineStream(folder, torch.device(device or "cpu"), torch_dtype, kwargs)
            streamer, models = stream.open(memory, _unstreamable(requested, in_gguf, cache_backend))
            pipeline = DiffusionPipeline.from_pretrained(
                str(model), dtype=torch_dtype, **_quantization_argument(requested), **kwargs, **models
            )
    except ImportError as error:
        raise missing_package(str(model), error) from error
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: diffusers does not know a config
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise CheckpointError(f"{model}: cannot be loaded ({reason}); download or convert it again") from error
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    _refuse_other_method(requested, modules)
    _place(pipeline, streamer, device)
    _choose_kernels(_quantized_layers(modules.values()), activations, strict=strict)
    if strict:
        require_scaled_gemm(kernel_report(pipeline))
    if cache_backend is not None:
        enable_step_cache(pipeline, cache_backend, cache_config)
    return pipeline


def _models_read_by_layer(
    folder: Path, torch_dtype: torch.dtype, kwargs: Mapping[str, Any], requested: Collection[str]
) -> dict[str, nn.Module]:
    """The denoising models in spellings that no library loads; refuses other quantized weights without a block.

    Args:
        kwargs: those of `from_pretrained`
        requested: see `load_opened_models`
    """
    if kwargs.get("use_safetensors") is False:
        return {}
    models = load_opened_models(folder, torch_dtype, kwargs, requested, kwargs.get("variant"))
    refuse_undeclared(folder, {*kwargs, *models}, kwargs.get("variant"))
    return models


def _load_gguf_components(
    model: str | Path,
    torch_dtype: torch.dtype,
    requested: Mapping[str, Any],
    in_gguf: Mapping[str, GgufModel],
    hub_options: Mapping[str, Any],
) -> dict[str, Any]:
    """The denoising models whose weights are in GGUF, in the pipeline or in files that a request names.

    diffusers' pipelines load neither.
    """
    folders = {folder.name: folder for folder in find_gguf_components(model, hub_options)}
    for name in folders.keys() & {*requested, *in_gguf}:
        method = Gguf.method if name in in_gguf else requested[name].meaning.method
        raise RecipeError(
            f"quantization: {name} is stored in GGUF, found a request for {method}; leave quantization out, or start "
            "from the unquantized model"
        )
    if not folders and not in_gguf:
        return {}
    index = DiffusionPipeline.load_config(str(model), **hub_options)
    classes = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
    loaded = {
        name: load_gguf(folder, classes[name], torch_dtype, config=str(folder))
        for name, folder in folders.items()
        if name in classes
    }
    elsewhere = {key: value for key, value in hub_options.items() if key != "revision"}  # another repository's
    for name, request in in_gguf.items():
        file = Path(request.gguf_model)
        file = file if file.is_file() else fetch_gguf_file(request.gguf_model, elsewhere)
        is_local = Path(model).is_dir()
        config = (
            {"config": str(Path(model) / name)} if is_local else {"config": model, "subfolder": name, **hub_options}
        )
        loaded[name] = load_gguf(file, classes[name], torch_dtype, **config)
    return loaded


def _local_folder(model: str | Path, kwargs: dict[str, Any]) -> Path:
    """The pipeline's folder; diffusers downloads a repository, so that its files can be looked at before they load."""
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(DiffusionPipeline.download(str(model), **kwargs))
        kwargs.pop("force_download", None)  # once is enough
    return folder


def _requested_configs(
    model: str, quantization: QuantizationSpec, hub_options: Mapping[str, Any]
) -> tuple[dict[str, DiffusersConfig | TransformersConfig], dict[str, GgufModel]]:
    """Component to its configuration, as an object of its library; and the components to load from GGUF."""
    config = None if quantization is None else build_quant_config(quantization)
    if config is None:
        return {}, {}
    index = DiffusionPipeline.load_config(model, **hub_options)
    libraries = {name: entry[0] for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    _refuse_unknown_components(config, libraries)
    configs = {name: found for name in libraries if (found := _config_for(config, name)) is not None}
    in_gguf = {name: found for name, found in configs.items() if isinstance(found, GgufModel)}
    _check_gguf(in_gguf)
    requested = {}
    for name in [name for name in configs if name not in in_gguf]:
        library, method = libraries[name], configs[name].method
        if library not in CONFIG_CLASSES or ("vae" in name and method != Fp8Storage.method):
            raise RecipeError(f"quantization: {name} cannot be quantized to {method}, use None or fp8_storage")
        config = configs[name]
        config = replace(config, component=name) if isinstance(config, CalibratedConfig) else config
        requested[name] = CONFIG_CLASSES[library].of(config)
    return requested, in_gguf


def _check_gguf(in_gguf: Mapping[str, GgufModel]) -> None:
    """Refuses components that diffusers cannot load from GGUF, and one file for several of them."""
    for name in in_gguf.keys() - {*DENOISERS}:
        raise RecipeError(f"quantization: found gguf for {name}, expected it for one of {', '.join(DENOISERS)}")
    by_file = {request.gguf_model: name for name, request in in_gguf.items()}
    if len(by_file) < len(in_gguf):
        raise RecipeError(
            f"quantization: found one gguf_model for {' and '.join(in_gguf)}, expected a file for each, as "
            "{'transformer': {'method': 'gguf', 'gguf_model': ...}, 'transformer_2': ...}"
        )


def _hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}


def _config_for(config: QuantizationConfig | ComponentQuantizationConfig, name: str) -> QuantizationConfig | None:
    """The configuration of a component. A config that names no component, and a default, mean the denoising models."""
    is_named = isinstance(config, ComponentQuantizationConfig) and any(map(name.startswith, config.component_configs))
    return resolve_component_quant_config(config, name) if is_named or name in DENOISERS else None


def _refuse_unknown_components(
    config: QuantizationConfig | ComponentQuantizationConfig, components: Iterable[str]
) -> None:
    if isinstance(config, ComponentQuantizationConfig):
        for key, value in config.component_configs.items():
            if value is not None and not any(name.startswith(key) for name in components):
                raise RecipeError(f"quantization: found component '{key}', expected one of {', '.join(components)}")


def _place(pipeline: DiffusionPipeline, streamer: Streamer | None, device: str | torch.device | None) -> None:
    if streamer is not None:
        attach(pipeline, streamer)
    elif device is not None:
        pipeline.to(device)


def _unstreamable(requested: Mapping[str, Any], in_gguf: Mapping[str, Any], cache_backend: str | None) -> str | None:
    """Why a pipeline is loaded whole although it might not fit; None if there is no reason."""
    if requested or in_gguf:
        return "is quantized while it loads"
    return None if cache_backend is None else "has a step cache, which skips blocks"


def _quantization_argument(requested: Mapping[str, Any]) -> dict[str, Any]:
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=dict(requested))} if requested else {}


def _refuse_other_method(requested: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Refuses a request for another method than that of a component that is stored quantized."""
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


def _choose_kernels(layers: Iterable[QuantizedLinear], activations: Activations, *, strict: bool) -> None:
    for layer in layers:
        if activations != "quantized":
            layer.activations = activations
        if strict:
            layer.prefers_scaled_gemm = True
