"""Makes `from_pretrained` of diffusers read our checkpoints, and quantize others while it loads them.

diffusers has no public way to register a quantizer; like its other third-party quantizers, ours is entered in its
mappings, under names that are free. A `modelopt` block belongs to diffusers, except those with a `quant_algo`, which
describe exported checkpoints that its own quantizer cannot read. An `auto-round` block is ours where it describes what
we run, W4A16 in GPTQ's packing: diffusers needs the auto-round package, and casts its scales to the model's dtype. Who
passes diffusers' own `AutoRoundConfig` gets its quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import AutoRoundConfig, QuantizationConfigMixin
from torch import Tensor, nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects import omni_convert, vllm_omni
from omni_convert.formats.dialects.config_block import read_claimed_block
from omni_convert.formats.errors import CheckpointError, RecipeError, counted
from omni_convert.formats.format import Format
from omni_convert.formats.table import LOADABLE
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
from omni_convert.loaders.request.block import ConfigBlock

__all__ = ["DiffusersConfig", "DiffusersOmniQuantizer", "register"]


class DiffusersConfig(ConfigBlock, QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """The block of a diffusers model."""

    spell = staticmethod(vllm_omni.to_block)


class DiffusersOmniQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # diffusers is untyped
    """Loads quantized layers as they are on disk; or, on an unquantized checkpoint, quantizes layer by layer."""

    use_keep_in_fp32_modules = True
    required_packages = ("accelerate",)

    def __init__(self, quantization_config: DiffusersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.meaning = quantization_config.meaning
        self.where = "checkpoint"
        self.files: Sequence[str] = ()
        self.specs: dict[str, TensorSpec] = {}
        self.loaded: set[str] = set()  # tensors of quantized layers, taken raw from the file
        self.planned: dict[str, PlannedLayer] = {}  # layers to quantize while loading
        self.fits = GroupFits()
        self.layers: dict[str, tuple[Format, int]] = {}  # the quantized ones, with in_features

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuses offloading to disk: what diffusers writes there has passed through a cast of the scales."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise RecipeError("device_map: found 'disk', expected devices in memory for a quantized model")

    @property
    def supports_parallel_loading(self) -> bool:
        return bool(self.pre_quantized)  # quantizing in several threads would need memory for several layers

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        """Called before the model is prepared: the place to see what the files hold."""
        self.where, self.files = str(Path(checkpoint_files[0]).parent), checkpoint_files
        if self.pre_quantized:
            self.specs = read_headers(checkpoint_files)
        else:
            self.fits = GroupFits(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if not self.pre_quantized:
            self.planned, self.meaning = select_layers(model, self.meaning)
            self.quantization_config.say(self.meaning, self.planned)
            return
        self.loaded = install_empty_layers(model, self.specs, self.meaning, self.where)
        refuse_homeless(model, self.specs, self.where)
        check_stored_values(self.files, self.loaded, self.where)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], **_: Any) -> list[str]:
        """Raises CheckpointError where diffusers would only warn and leave tensors on the meta device."""
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
        """Takes the tensor from `state_dict`: the one that diffusers hands over has been cast, scales included."""
        raw = state_dict[param_name]
        stem, _dot, suffix = param_name.rpartition(".")
        if not self.pre_quantized:
            install_quantized(model, stem, raw.to(target_device), self.planned[stem], self.where, self.fits)
            return
        try:
            setattr(model.get_submodule(stem), suffix, raw.to(target_device))
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {stem}.{error}") from None

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self.fits.close()
        settle_compute_dtypes(model)
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                self.layers[name] = (layer.format, layer.in_features)
                layer.select_kernel()
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], **_: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save_pretrained` writes: the tensors as they were on disk."""
        return to_disk_state(state_dict, self.layers), {}

    def _dequantize(self, model: Any) -> Any:
        restore_linears(model, model.dtype)
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)  # noqa: SLF001  # a config can be added to, not removed from
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Enters our quantizer in diffusers' mappings, under every method's name that nobody owns yet."""
    for name in (omni_convert.QUANT_METHOD, *LOADABLE):
        if name not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and name not in auto.AUTO_QUANTIZER_MAPPING:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = DiffusersConfig
            auto.AUTO_QUANTIZER_MAPPING[name] = DiffusersOmniQuantizer
    _claim_blocks()


def _claim_blocks() -> None:
    """Has diffusers give us the blocks that we read under its own names, unless a caller names its quantizer."""
    library: Any = auto.DiffusersAutoQuantizer
    read_theirs, merge_theirs = library.from_dict, library.merge_quantization_configs
    if getattr(read_theirs, "reads_ours", False):
        return

    def from_dict(_cls: type, block: dict[str, Any]) -> Any:
        meaning = read_claimed_block(block)
        return read_theirs(block) if meaning is None else DiffusersConfig(block, meaning)

    def merge(_cls: type, block: Any, asked_for: Any) -> Any:
        is_theirs = isinstance(asked_for, AutoRoundConfig) and isinstance(block, dict)
        return merge_theirs(AutoRoundConfig.from_dict(block) if is_theirs else block, asked_for)

    from_dict.reads_ours = True  # type: ignore[attr-defined]  # marks the wrapper, so that it wraps once
    library.from_dict = classmethod(from_dict)
    library.merge_quantization_configs = classmethod(merge)
