"""The description of a tensor in a file, before any of its bytes are read: name, dtype, shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES", "Run", "TensorSpec"]

# safetensors' dtype names, in the order of its own list.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor; enough to plan a whole conversion."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a tensor.

    Attributes:
        source: its name
        start: the first row
        count: how many
    """

    source: str
    start: int
    count: int
