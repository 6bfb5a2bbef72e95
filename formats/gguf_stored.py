"""GGUF's types as they are read: every type that the `gguf` package dequantizes.

Tensors:    NAME.weight  U8 [out / rows, bytes]   blocks as they are in the file; rows is 1, but where a block reaches
                                                  over the end of a row, as in convolutions that ComfyUI-GGUF reshaped
Arithmetic: `gguf.quants.dequantize` of the rows, bit for bit; in torch, on any device, for the types that are written
Consumers:  see `formats/gguf.py`, which has the types that are written
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np
import torch
from torch import Tensor

from omni_convert.formats.containers.gguf_file import rows_together
from omni_convert.formats.format import Format
from omni_convert.formats.gguf import BLOCK_TYPES
from omni_convert.formats.rows import TensorLayout

__all__ = ["StoredGguf", "is_dequantized"]

# Bits of a weight, at least → `Format.largest_error`.
LARGEST_ERRORS = ((8.0, 0.03), (4.0, 0.3), (0.0, 1.0))


@dataclass(frozen=True)
class StoredGguf(Format):
    """A weight in blocks.

    Attributes:
        type: name of the type
        shape: of the weight; its first dimension is rows
    """

    type: str
    shape: tuple[int, ...]

    method = "gguf"

    @property
    def activation_scheme(self) -> str:
        return "none"

    @property
    def label(self) -> str:
        return f"{self.method} {self.type}"

    @property
    def row_multiple(self) -> int:  # type: ignore[override]  # follows the fields
        return rows_together(self._kind, self.shape)

    @property
    def largest_error(self) -> float:
        block, size = gguf.GGML_QUANT_SIZES[self._kind]
        return next(error for bits, error in LARGEST_ERRORS if size * 8 >= bits * block)

    @property
    def _kind(self) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType[self.type]

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        together = self.row_multiple
        block, size = gguf.GGML_QUANT_SIZES[self._kind]
        shape = (out_features // together, in_features * together // block * size)
        return {"weight": TensorLayout(torch.uint8, shape, together)}

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return self.shape

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        blocks = tensors["weight"]
        if self.type in BLOCK_TYPES:
            kind = BLOCK_TYPES[self.type]
            return kind.dequantize(blocks.reshape(-1, kind.size)).view(-1, math.prod(self.shape[1:]))
        with np.errstate(all="ignore"):  # what is not finite is told by who reads it
            numbers = gguf.quants.dequantize(blocks.cpu().numpy(), self._kind)
        return torch.from_numpy(numbers).to(blocks.device).view(-1, math.prod(self.shape[1:]))

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        blocks = tensors["weight"]
        if self.type == "MXFP4" and bool((blocks.reshape(-1, gguf.GGML_QUANT_SIZES[self._kind][1])[:, 0] == 255).any()):
            return "weight: found the E8M0 byte 255 (NaN), expected 0 to 254"
        if self.type in BLOCK_TYPES:
            kind = BLOCK_TYPES[self.type]
            is_finite = kind.is_finite(blocks.reshape(-1, kind.size))
        else:
            is_finite = bool(self.dequantize(tensors).isfinite().all())
        if is_finite:
            return None
        return "weight: found scales that are infinite or NaN, expected numbers (in FP16 up to 65504)"


@cache
def is_dequantized(type_name: str) -> bool:
    """Whether the `gguf` package that is installed turns this type into numbers."""
    kind = gguf.GGMLQuantizationType[type_name]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
