"""How transformers and DeepSeek spell FP8 in blocks; text encoders come so.

Tensors:  NAME.weight            F8_E4M3 [out, in]
          NAME.weight_scale_inv  F32 or F8_E8M0 [ceil(out / N), ceil(in / K)], or one number; it multiplies
          NAME.activation_scale  F32 [], if activations are static
Block:    {"quant_method": "fp8", "activation_scheme": ..., "weight_block_size": [128, 128],
          "modules_to_not_convert": [...]}, without vLLM-Omni's flag
Limits:   of what is made here, only FP8 in blocks with dynamic activations is written
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omni_convert.formats.dialect import Dialect, Found, StoredLayer, WrittenSpelling
from omni_convert.formats.dialects.bare import signed_layers
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import Fp8Block

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

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if isinstance(fmt, Fp8Block):
            return WrittenSpelling()
        return "transformers' fp8 is FP8 in blocks: --weight-block-size"

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """As `FineGrainedFP8Config` reads it.

        Raises:
            RecipeError: the layers have blocks of several sizes, which one block cannot say.
        """
        sizes = {fmt.block_size for fmt in layers.values() if isinstance(fmt, Fp8Block)}
        if len(sizes) > 1:
            raise RecipeError(f"found blocks of {sorted(sizes)}, expected one size; transformers knows one for all")
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(sizes.pop()),
            "modules_to_not_convert": sorted(ignored),
        }


TRANSFORMERS = Transformers()
