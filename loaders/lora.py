"""Makes PEFT accept quantized layers, and so `load_lora_weights` and `add_adapter` of diffusers.

PEFT looks layers up by class. Its public way to add a class does not work if another library writes the config, so its
one function that makes LoRA layers is wrapped. The adapter's output is added to the layer's; the codes never change.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from omni_convert.loaders.layers.column_parts import ColumnParts
from omni_convert.loaders.layers.fp8_storage import Fp8WeightStorage
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear

__all__ = ["register"]


def register() -> None:
    """Wraps PEFT's function if PEFT is installed. A second call does nothing."""
    if find_spec("peft") is None:
        return
    from peft.tuners.lora.model import LoraModel

    create_theirs = LoraModel._create_new_module  # noqa: SLF001  # the only place where layers become LoRA layers
    if getattr(create_theirs, "takes_quantized_linear", False):
        return

    def create(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        layer: Any = target
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        is_quantized = isinstance(base, (QuantizedLinear, ColumnParts))
        if is_quantized or (isinstance(base, Fp8WeightStorage) and isinstance(base, nn.Linear)):
            from omni_convert.loaders.layers.lora_linear import QuantizedLoraLinear, StoredLoraLinear

            wrapper = QuantizedLoraLinear if is_quantized else StoredLoraLinear
            lora_config._register_custom_module({type(base): wrapper})  # noqa: SLF001  # no public name
        created: nn.Module = create_theirs(lora_config, adapter_name, target, **kwargs)
        return created

    create.takes_quantized_linear = True  # type: ignore[attr-defined]  # marks the wrapper, so that it wraps once
    LoraModel._create_new_module = staticmethod(create)  # noqa: SLF001
