"""How transformers and DeepSeek spell FP8 in blocks; text encoders come so.

Tensors:  NAME.weight            F8_E4M3 [out, in]
          NAME.weight_scale_inv  F32 or F8_E8M0 [ceil(out / N), ceil(in / K)], or one number; it multiplies
          NAME.activation_scale  F32 [], if activations are static
Block:    {"quant_method": "fp8", "activation_scheme": ..., "weight_block_size": [128, 128],
          "modules_to_not_convert": [...]}, without vLLM-Omni's flag
"""

from __future__ import annotations

from collections.abc import Iterator

from omni_convert.formats.dialect import Dialect, Found, StoredLayer
from omni_convert.formats.dialects.bare import signed_layers

__all__ = ["TRANSFORMERS"]

NAMES = {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}


class Transformers(Dialect):
    """See the module."""

    name = "transformers"

    def recognises(self, found: Found) -> bool:
        return found.quant_method == "fp8" and "is_checkpoint_fp8_serialized" not in found.block

    def stored_layers(self, found: Found) -> Iterator[StoredLayer]:
        if next(iter(found.stems("weight_scale_inv")), None) is None:
            return signed_layers(found)  # vLLM's, who leave the flag out
        return signed_layers(found, NAMES)


TRANSFORMERS = Transformers()
