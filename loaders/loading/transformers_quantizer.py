"""Makes `from_pretrained` of transformers read our text encoders, and quantize others while it loads them.

transformers owns the names `fp8`, `mxfp8`, `mxfp4` and `nvfp4`, so ours is registered as `omni_convert` alone. It also
owns `auto-round`, whose blocks are ours where they describe W4A16 in GPTQ's packing; who passes its `AutoRoundConfig`
gets its quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects import auto_round, omni_convert
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.group_fit import GroupFits, PlannedLayer
from omni_convert.loaders.loading.headers import read_headers
from omni_convert.loaders.loading.install import (
    install_empty_layers,
    install_quantized,
    refuse_homeless,
    restore_linears,
    select_layers,
    settle_compute_dtypes,
    to_disk_state,
)
from omni_convert.loaders.loading.values import check_stored_values
from omni_convert.loaders.memory.packed_int4 import CODES
from omni_convert.loaders.request.block import ConfigBlock

__all__ = ["TransformersConfig", "TransformersOmniQuantizer", "register"]

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TransformersConfig(ConfigBlock, QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The block of a transformers model."""

    spell = staticmethod(omni_convert.to_block)


class TransformersOmniQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Loads quantized layers as they are on disk; or, on an unquantized checkpoint, quantizes layer by layer."""

    def __init__(self, quantization_config: TransformersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.meaning = quantization_config.meaning
        self.where = "checkpoint"
        self.loaded: set[str] = set()  # tensors of quantized layers, taken raw from the file
        self.planned: dict[str, PlannedLayer] = {}  # layers to quantize while loading
        self.fits = GroupFits()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """`auto` may have found the dtype of codes."""
        return dtype if dtype in MODEL_DTYPES else torch.bfloat16

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        files = checkpoint_files or ()
        self.where = str(Path(files[0]).parent) if files else type(model).__name__
        if not self.pre_quantized:
            self.planned, self.meaning = select_layers(model, self.meaning)
            self.fits = _open_fits(files, model)
            self.quantization_config.say(self.meaning, self.planned)
            return
        stored = _renamed(read_headers(files), model)
        specs = {name: replace(spec, name=name) for name, spec in stored.items()}
        self.loaded = install_empty_layers(model, specs, self.meaning, self.where)
        # A plain tensor without a home is common here (a causal LM's head under a base model); a quantized one is not.
        refuse_homeless(model, _of_quantized_layers(specs), self.where)
        check_stored_values(files, {stored[name].name for name in self.loaded}, self.where)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """No cast for codes and scales, whatever `keep_in_fp32` lists may say."""
        if self.loaded.intersection(converter.target_patterns):
            return None
        new_dtype: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new_dtype

    def param_needs_quantization(self, _model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.planned

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOp(self.planned, self.fits, self.where)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self.fits.close()
        settle_compute_dtypes(model)
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear) and layer.device.type != "meta":
                layer.select_kernel()
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save_pretrained` writes: the tensors as they were on disk."""
        layers = {
            name: (layer.format, layer.in_features)
            for name, layer in model.named_modules()
            if isinstance(layer, QuantizedLinear)
        }
        return to_disk_state(model.state_dict(), layers), {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        restore_linears(model, dtype or torch.bfloat16)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _QuantizeOp(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """Quantizes one weight when transformers has read it."""

    def __init__(self, planned: Mapping[str, PlannedLayer], fits: GroupFits, where: str) -> None:
        self.planned = planned
        self.fits = fits
        self.where = where

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        stem = name.removesuffix(".weight")
        layer = install_quantized(kwargs["model"], stem, weight, self.planned[stem], self.where, self.fits)
        kwargs["missing_keys"].discard(name)
        return {f"{stem}.{name}": tensor for name, tensor in layer.named_buffers()}


def _renamed(specs: Mapping[str, TensorSpec], model: nn.Module) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint by the names that transformers will give them in this model.

    Its rules know weights only; whatever belongs to a layer follows its weight.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    homes = model.state_dict()

    def rename(name: str) -> str:
        renamed: str = rename_source_key(name, renamings, converters, model.base_model_prefix, homes)[0]
        return renamed

    renamed_specs: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        stem, dot, suffix = name.rpartition(".")
        weight = f"{stem}.weight"
        is_of_layer = weight in specs or f"{stem}.{CODES}" in specs
        new_name = rename(weight).removesuffix(".weight") + dot + suffix if is_of_layer else rename(name)
        renamed_specs[new_name] = spec
    return renamed_specs


def _open_fits(files: Sequence[str], model: nn.Module) -> GroupFits:
    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        return GroupFits()
    return GroupFits(files, {new: spec.name for new, spec in _renamed(read_headers(files), model).items()})


def _of_quantized_layers(specs: Iterable[str]) -> list[str]:
    names = set(specs)
    stems = {name.rpartition(".")[0] for name in names if "scale" in name.rpartition(".")[2]}
    return [name for name in specs if name.rpartition(".")[0] in stems]


def register() -> None:
    """Registers our quantizer, once."""
    if omni_convert.QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(omni_convert.QUANT_METHOD)(TransformersOmniQuantizer)
        auto.register_quantization_config(omni_convert.QUANT_METHOD)(TransformersConfig)
        _claim_blocks()


def _claim_blocks() -> None:
    read_theirs = auto.AutoQuantizationConfig.from_dict

    def from_dict(_cls: type, block: dict[str, Any]) -> Any:
        meaning = auto_round.from_block(block)
        return read_theirs(block) if meaning is None else TransformersConfig(block, meaning)

    auto.AutoQuantizationConfig.from_dict = classmethod(from_dict)
