"""Makes `from_pretrained` of transformers read our text encoders, and quantize others while it loads them.

transformers owns the names `fp8`, `mxfp8`, `mxfp4` and `nvfp4`, so ours is registered as `omni_convert` alone. It also
owns `auto-round`, whose blocks are ours if they describe W4A16 in GPTQ's packing. A caller who passes its
`AutoRoundConfig` gets its quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from omni_convert.loaders.loading.group_fit import GroupFits
from omni_convert.loaders.loading.install import install_quantized, quantized_layers, restore_linears, to_disk_state
from omni_convert.loaders.loading.quantizer import ConfigBlock, LayerQuantizer
from omni_convert.loaders.loading.select import PlannedLayer
from omni_convert.loaders.memory.packed_int4 import CODES

__all__ = ["TransformersConfig", "TransformersOmniQuantizer", "names_in_model", "register"]

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TransformersConfig(ConfigBlock, QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The block of a transformers model."""

    to_block = staticmethod(omni_convert.to_block)


class TransformersOmniQuantizer(LayerQuantizer, HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Our quantizer as transformers calls it."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Replaces the dtype of codes, which `auto` may have found, by bfloat16."""
        return dtype if dtype in MODEL_DTYPES else torch.bfloat16

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self._prepare(model, checkpoint_files or ())

    def _under_model_names(self, specs: Mapping[str, TensorSpec], model: nn.Module) -> Mapping[str, TensorSpec]:
        return names_in_model(specs, model)

    def _required_names(self, names: Iterable[str]) -> list[str]:
        """Names of layers with a scale; plain tensors may be left over, as a causal LM's head is for a base model."""
        known = list(names)
        stems = {name.rpartition(".")[0] for name in known if "scale" in name.rpartition(".")[2]}
        return [name for name in known if name.rpartition(".")[0] in stems]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Prevents a cast of codes and scales, whatever `keep_in_fp32` lists say."""
        if self.loaded.intersection(converter.target_patterns):
            return None
        new_dtype: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new_dtype

    def param_needs_quantization(self, _model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.planned

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOp(self.planned, self.fits, self.where)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors as they were on disk, for `save_pretrained`."""
        return to_disk_state(model.state_dict(), quantized_layers(model)), {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        restore_linears(model, dtype or torch.bfloat16)
        return model

    def is_serializable(self) -> bool:
        return True


def names_in_model(specs: Mapping[str, TensorSpec], model: nn.Module, *, merges: bool = True) -> dict[str, TensorSpec]:
    """The tensors of files by their names in a model of transformers, which renames some.

    Its renamings know weights alone; the other tensors of a layer follow its weight.

    Args:
        merges: a tensor that becomes a part of another, as an expert's does, has the name of that
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if merges and isinstance(entry, WeightConverter)]
    own = model.state_dict()

    def rename(name: str) -> str:
        renamed: str = rename_source_key(name, renamings, converters, model.base_model_prefix, own)[0]
        return renamed

    renamed_specs: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        stem, dot, suffix = name.rpartition(".")
        weight = f"{stem}.weight"
        is_of_layer = weight in specs or f"{stem}.{CODES}" in specs
        new_name = rename(weight).removesuffix(".weight") + dot + suffix if is_of_layer else rename(name)
        renamed_specs[new_name] = spec
    return renamed_specs


class _QuantizeOp(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """Quantizes a weight when transformers has read it."""

    def __init__(self, planned: Mapping[str, PlannedLayer], fits: GroupFits | None, where: str) -> None:
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


def register() -> None:
    """Registers our quantizer. A second call does nothing."""
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
