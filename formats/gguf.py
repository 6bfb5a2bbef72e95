"""GGUF: the types of tensors that the `gguf` package can make, for diffusers, ComfyUI-GGUF and their like.

Tensors:    NAME.weight  U8 [out, in / 32 * bytes]   blocks of `arithmetic/ggml/`; BF16 or F16 [out, in]
Arithmetic: of each type; the runtime dequantizes a weight before every use, and activations stay as they are.
Consumers:  diffusers' `GGUFQuantizationConfig` (all but MXFP4), ComfyUI-GGUF.
Limits:     in a multiple of 32, but for BF16 and F16; scales are FP16 and end at 65504.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.blocks import BLOCK, BLOCK_TYPES
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import TensorLayout

__all__ = ["CACHED_BLOCKS", "DEFAULT_TYPE", "GGUF_TYPES", "PLAIN_TYPES", "Gguf"]

PLAIN_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
GGUF_TYPES = (*BLOCK_TYPES, *PLAIN_TYPES)
DEFAULT_TYPE = "Q8_0"
#: So many at a time stay in a core's cache from one operation to the next: up to three times as fast.
CACHED_BLOCKS = 8192


@dataclass(frozen=True)
class Gguf(QuantizingFormat):
    """A weight in one of GGUF's types.

    Attributes:
        type: one of `GGUF_TYPES`

    Raises:
        RecipeError: there is no such type here.
    """

    type: str = DEFAULT_TYPE

    method = "gguf"
    activation_schemes = ("none",)
    options = ("gguf_type", "gguf_names")

    @classmethod
    def build(cls, options: FormatOptions) -> Gguf:
        return cls(options.gguf_type or DEFAULT_TYPE)

    def __post_init__(self) -> None:
        if self.type not in GGUF_TYPES:
            raise RecipeError(f"--gguf-type: found '{self.type}', expected one of {', '.join(GGUF_TYPES)}")

    @property
    def activation_scheme(self) -> str:
        return "none"

    @property
    def label(self) -> str:
        return f"{self.method} {self.type}"

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if self.type in PLAIN_TYPES or in_features % BLOCK == 0:
            return None
        return f"{in_features} columns are no multiple of {BLOCK}"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        if self.type in PLAIN_TYPES:
            return {"weight": TensorLayout(PLAIN_TYPES[self.type], (out_features, in_features))}
        columns = in_features // BLOCK * BLOCK_TYPES[self.type].size
        return {"weight": TensorLayout(torch.uint8, (out_features, columns))}

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        if self.type in PLAIN_TYPES:
            return {"weight": rows.to(PLAIN_TYPES[self.type])}
        kind, blocks = BLOCK_TYPES[self.type], rows.reshape(-1, BLOCK)
        stored = torch.empty(len(blocks), kind.size, dtype=torch.uint8, device=rows.device)
        count = CACHED_BLOCKS if rows.device.type == "cpu" else max(1, len(blocks))
        for start in range(0, len(blocks), count):
            stored[start : start + count] = kind.quantize(blocks[start : start + count].float(), search=False)
        return {"weight": stored.view(len(rows), -1)}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"]
        if self.type in PLAIN_TYPES:
            return weight.float()
        kind = BLOCK_TYPES[self.type]
        return kind.dequantize(weight.reshape(-1, kind.size)).view(len(weight), -1)

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        weight = tensors["weight"]
        if self.type in PLAIN_TYPES:
            return None if bool(weight.isfinite().all()) else f"weight: found numbers beyond {self.type}"
        kind = BLOCK_TYPES[self.type]
        if kind.is_finite(weight.reshape(-1, kind.size)):
            return None
        return "weight: found scales that are infinite or NaN, expected numbers (in FP16 up to 65504)"
