"""Makes `from_pretrained` of diffusers read our checkpoints, and quantize others while it loads them.

diffusers has no public way to register a quantizer. Ours is entered in its mappings under names that are free, as are
its other third-party quantizers. Three blocks are ours although diffusers has another quantizer for their name:

- `modelopt` with a `quant_algo`, which describes an exported checkpoint that diffusers' quantizer cannot read;
- `bitsandbytes` for NF4, which then runs without the package and without a GPU;
- `auto-round` for W4A16 in GPTQ's packing, because diffusers needs the auto-round package and casts its scales to the
  model's dtype. A caller who passes diffusers' own `AutoRoundConfig` or `BitsAndBytesConfig` gets its quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import AutoRoundConfig, BitsAndBytesConfig, QuantizationConfigMixin
from torch import Tensor, nn

from omni_convert.formats.dialects import omni_convert, vllm_omni
from omni_convert.formats.dialects.config_block import read_claimed_block
from omni_convert.formats.errors import CheckpointError, RecipeError, counted
from omni_convert.formats.format import Format
from omni_convert.formats.table import LOADABLE, is_named_by_dialect
from omni_convert.loaders.loading.install import install_quantized, quantized_layers, restore_linears, to_disk_state
from omni_convert.loaders.loading.opened import OpenedLayers, spelled_state
from omni_convert.loaders.loading.quantizer import ConfigBlock, LayerQuantizer

__all__ = ["DiffusersConfig", "DiffusersOmniQuantizer", "register"]


class DiffusersConfig(ConfigBlock, QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """The block of a diffusers model."""

    to_block = staticmethod(vllm_omni.to_block)


class DiffusersOmniQuantizer(LayerQuantizer, DiffusersQuantizer):  # type: ignore[misc]  # diffusers is untyped
    """Our quantizer as diffusers calls it."""

    use_keep_in_fp32_modules = True
    required_packages = ("accelerate",)
    is_serializable = True

    def __init__(self, quantization_config: DiffusersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: Sequence[str] = ()
        self._layers: dict[str, tuple[Format, int]] = {}

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuses offloading to disk: diffusers casts the scales that it writes there."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise RecipeError("device_map: found 'disk', expected devices in memory for a quantized model")

    @property
    def supports_parallel_loading(self) -> bool:
        return bool(self.pre_quantized)  # quantizing in several threads would need memory for several layers

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        """Keeps the paths of the files, which diffusers passes to no later step.

        Layers that are read through their dialect count as loaded under their names in the model.
        """
        self._files = checkpoint_files
        if not self.pre_quantized or not is_named_by_dialect(self.meaning.method):
            return loaded_keys
        in_files, self.loaded = OpenedLayers(checkpoint_files, self.quantization_config.block).names()
        return [*({*loaded_keys} - in_files), *self.loaded]

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any = None, **_: Any) -> None:
        self._prepare(model, self._files, device_map)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], **_: Any) -> list[str]:
        """Raises CheckpointError; diffusers would only warn and leave the tensors on the meta device."""
        if missing_keys:
            missing = ", ".join(sorted(missing_keys)[:3])
            raise CheckpointError(
                f"{self.where}: found {counted(len(missing_keys), 'tensor')} of {type(model).__name__} missing "
                f"({missing}), expected all; the checkpoint is incomplete or belongs to another model"
            )
        return missing_keys

    def check_if_quantized_param(
        self, _model: nn.Module, _value: Tensor, param_name: str, _state_dict: Mapping[str, Tensor], **_: Any
    ) -> bool:
        return param_name in self.loaded or param_name.removesuffix(".weight") in self.planned

    def create_quantized_param(
        self,
        model: nn.Module,
        _cast_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: Mapping[str, Tensor],
        *_: Any,
        **__: Any,
    ) -> None:
        """Uses the tensor in `state_dict`, because diffusers has cast the other one, scales included."""
        raw = state_dict[param_name]
        stem, _dot, suffix = param_name.rpartition(".")
        if self.dialect is not None:
            return  # the layer is there already
        if not self.pre_quantized:
            install_quantized(model, stem, raw.to(target_device), self.planned[stem], self.where, self.fits)
            return
        try:
            setattr(model.get_submodule(stem), suffix, raw.to(target_device))
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {stem}.{error}") from None

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self._layers = quantized_layers(model)
        return super()._process_model_after_weight_loading(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], **_: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors as they were on disk, for `save_pretrained`."""
        if self.dialect is not None:
            return spelled_state(state_dict, self._layers, self.dialect), {}
        return to_disk_state(state_dict, self._layers), {}

    def _dequantize(self, model: Any) -> Any:
        restore_linears(model, model.dtype)
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)  # noqa: SLF001  # a config can be added to, not removed from
        return model


def register() -> None:
    """Enters our quantizer in diffusers' mappings, under the names of methods that are still free."""
    for name in (omni_convert.QUANT_METHOD, *LOADABLE):
        if name not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and name not in auto.AUTO_QUANTIZER_MAPPING:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = DiffusersConfig
            auto.AUTO_QUANTIZER_MAPPING[name] = DiffusersOmniQuantizer
    _claim_blocks()


def _claim_blocks() -> None:
    """Makes diffusers give us the blocks that we read under its names, unless a caller passes its own config."""
    library: Any = auto.DiffusersAutoQuantizer
    read_theirs, merge_theirs = library.from_dict, library.merge_quantization_configs
    if getattr(read_theirs, "reads_ours", False):
        return

    def from_dict(_cls: type, block: dict[str, Any]) -> Any:
        meaning = read_claimed_block(block)
        return read_theirs(block) if meaning is None else DiffusersConfig(block, meaning)

    def merge(_cls: type, block: Any, asked_for: Any) -> Any:
        is_theirs = isinstance(asked_for, AutoRoundConfig | BitsAndBytesConfig) and isinstance(block, dict)
        return merge_theirs(type(asked_for).from_dict(block) if is_theirs else block, asked_for)

    from_dict.reads_ours = True  # type: ignore[attr-defined]  # marks the wrapper, so that it wraps once
    library.from_dict = classmethod(from_dict)
    library.merge_quantization_configs = classmethod(merge)
