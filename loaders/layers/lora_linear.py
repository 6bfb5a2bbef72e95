"""The layers that PEFT puts around a quantized one. Imports PEFT, so it is imported only where that is installed."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from omni_convert.formats.errors import RecipeError
from omni_convert.loaders.layers.column_parts import ColumnParts
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear

__all__ = ["QuantizedLoraLinear", "StoredLoraLinear"]


class StoredLoraLinear(Linear):  # type: ignore[misc]  # peft is untyped
    """A stored layer and its adapters, whose output is added to the layer's. Its codes never change.

    PEFT sees a plain weight, but what it writes there is lost.
    """

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            RecipeError: the adapter changes the weight when it is initialized.
        """
        start = config.init_lora_weights
        if isinstance(start, str) and start != "gaussian":
            raise _not_plain(adapter_name, f"init_lora_weights='{start}'")
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Always raises RecipeError: the sum would be rounded again, and no subtraction could restore the codes."""
        raise RecipeError(
            f"fuse_lora: found {self.get_base_layer()}, expected unquantized layers; leave the adapter unfused, "
            "or fuse it into the unquantized model and quantize that"
        )


class QuantizedLoraLinear(StoredLoraLinear):
    """A quantized layer and its adapters."""

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            RecipeError: the adapter needs more than the output of the layer, as DoRA does.
        """
        if config.use_dora:
            raise _not_plain(adapter_name, "DoRA")
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module  # of a class that PEFT warns of
        return layer.in_features, layer.out_features

    @staticmethod
    def _get_base_layer_device_and_dtype(base_layer: QuantizedLinear | ColumnParts) -> tuple[torch.device, None]:
        """PEFT casts adapters to this dtype, and that of the codes would ruin them."""
        return base_layer.device, None


def _not_plain(adapter_name: str, found: str) -> RecipeError:
    return RecipeError(f"adapter '{adapter_name}': found {found}, expected plain LoRA on a quantized model")
