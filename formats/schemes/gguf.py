"""GGUF: the types of tensors that diffusers, ComfyUI-GGUF and their like dequantize.

Tensors:    NAME.weight  U8 [out, in / block * bytes]   blocks of `arithmetic/ggml/`; BF16 or F16 [out, in]
Arithmetic: of each type; the runtime dequantizes a weight before every use, and activations stay as they are.
Consumers:  diffusers' `GGUFQuantizationConfig` (all but MXFP4), ComfyUI-GGUF.
Limits:     in a multiple of 32, but for BF16 and F16; scales are FP16 and end at 65504. Types of super-blocks need a
            multiple of 256; other weights get another type instead, as llama.cpp gives them: see `FALLBACKS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Self

import gguf
import numpy as np
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.blocks import BLOCK
from omni_convert.formats.arithmetic.ggml.blocks import BLOCK_TYPES as SIMPLE_TYPES
from omni_convert.formats.arithmetic.ggml.k_quants import K_QUANTS, SUPER_BLOCK
from omni_convert.formats.containers.gguf_file import rows_together
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.format import Calibration, ElementFormat, Format
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows

__all__ = [
    "BLOCK_TYPES",
    "CACHED_BLOCKS",
    "DEFAULT_TYPE",
    "GGUF_TYPES",
    "PLAIN_TYPES",
    "Gguf",
    "StoredGguf",
    "is_dequantized",
]

PLAIN_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
#: Type → how its blocks are made.
BLOCK_TYPES = {**SIMPLE_TYPES, **K_QUANTS}
GGUF_TYPES = (*BLOCK_TYPES, *PLAIN_TYPES)
DEFAULT_TYPE = "Q8_0"
#: Type of super-blocks → the type of rows that only smaller blocks fit.
FALLBACKS = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL", "IQ4_XS": "IQ4_NL"}
#: The type of rows that no blocks fit, if super-blocks were asked for.
LAST_TYPE = "F16"
#: Smallest weight of a column, relative to the mean of all.
LEAST_IMPORTANCE = 1e-4
#: So many blocks of 32 at a time stay in a core's cache from one operation to the next: up to three times as fast.
CACHED_BLOCKS = 8192
# Bits of a weight, at least → `Format.largest_error`.
LARGEST_ERRORS = ((8.0, 0.03), (4.0, 0.3), (0.0, 1.0))


@dataclass(frozen=True)
class Gguf(ElementFormat):
    """A weight in one of GGUF's types.

    Attributes:
        type: one of `GGUF_TYPES`
        search: choose scales by the squared error; else Q4_0 to Q5_1 are bit-equal to the `gguf` package's
        importance: weight of the squared errors of each column, float32 [in]; None takes the mean squares of the
            inputs, if they are known, and else weights all alike

    Raises:
        RecipeError: there is no such type here.
    """

    type: str = DEFAULT_TYPE
    search: bool = True
    importance: Tensor | None = field(default=None, compare=False, repr=False)

    method = "gguf"
    activation_schemes = ("none",)
    calibration = Calibration.IMPORTANCE
    options = ("gguf_type", "gguf_names", "imatrix")
    is_container = True

    @classmethod
    def build(cls, options: FormatOptions) -> Gguf:
        return cls(options.gguf_type or DEFAULT_TYPE, options.search, options.importance)

    def __post_init__(self) -> None:
        if self.type not in GGUF_TYPES:
            raise RecipeError(f"--gguf-type: found '{self.type}', expected one of {', '.join(GGUF_TYPES)}")

    @property
    def activation_scheme(self) -> str:
        return "none"

    @property
    def label(self) -> str:
        return f"{self.method} {self.type}"

    @property
    def element_bits(self) -> int:
        if self.type in PLAIN_TYPES:
            return 8 * PLAIN_TYPES[self.type].itemsize
        kind = BLOCK_TYPES[self.type]
        return 8 * kind.size // kind.numbers

    @property
    def uses_importance(self) -> bool:
        """Whether the importance of columns has an influence."""
        return self.type in BLOCK_TYPES and BLOCK_TYPES[self.type].uses_importance(search=self.search)

    def for_weight(self, shape: tuple[int, ...]) -> Self:
        columns = math.prod(shape[1:])
        if self.type not in FALLBACKS or columns % SUPER_BLOCK == 0:
            return self
        return replace(self, type=FALLBACKS[self.type] if columns % BLOCK == 0 else LAST_TYPE)

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if self.type in PLAIN_TYPES or in_features % BLOCK_TYPES[self.type].numbers == 0:
            return None
        return f"{in_features} columns are no multiple of {BLOCK_TYPES[self.type].numbers}"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        if self.type in PLAIN_TYPES:
            return {"weight": TensorLayout(PLAIN_TYPES[self.type], (out_features, in_features))}
        kind = BLOCK_TYPES[self.type]
        columns = in_features // kind.numbers * kind.size
        return {"weight": TensorLayout(torch.uint8, (out_features, columns))}

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> Tensor | None:
        """The importance of the columns, float32 [in]; None if none is known, or all of it is zero."""
        importance = inputs.mean_square() if self.importance is None and inputs is not None else self.importance
        return importance if importance is not None and bool(importance.any()) else None

    def quantize_rows(self, rows: Tensor, fitted: Tensor | None) -> dict[str, Tensor]:
        if self.type in PLAIN_TYPES:
            return {"weight": rows.to(PLAIN_TYPES[self.type])}
        kind = BLOCK_TYPES[self.type]
        blocks = rows.reshape(-1, kind.numbers)
        stored = torch.empty(len(blocks), kind.size, dtype=torch.uint8, device=rows.device)
        count = CACHED_BLOCKS * BLOCK // kind.numbers if rows.device.type == "cpu" else max(1, len(blocks))
        for start in range(0, len(blocks), count):
            part = blocks[start : start + count].float()
            importance = None if fitted is None else _importance_of(fitted, start, part)
            stored[start : start + count] = kind.quantize(part, importance, search=self.search)
        return {"weight": stored.view(len(rows), -1)}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"]
        if self.type in PLAIN_TYPES:
            return weight.float()
        kind = BLOCK_TYPES[self.type]
        return kind.dequantize(weight.reshape(-1, kind.size)).view(len(weight), -1)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._scale_and_minimum(tensors)[0]

    def element_minimum(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self._scale_and_minimum(tensors)[1]

    def _scale_and_minimum(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        weight = tensors["weight"]
        if self.type in PLAIN_TYPES:
            return torch.ones(1, 1, device=weight.device), None
        kind = BLOCK_TYPES[self.type]
        blocks = weight.reshape(-1, kind.size)
        scale, minimum = (
            None if numbers is None else numbers.expand(-1, kind.numbers).reshape(len(weight), -1)
            for numbers in kind.scale_and_minimum(blocks)
        )
        assert scale is not None
        return scale, minimum

    def round_elements(self, values: Tensor) -> Tensor:
        if self.type in PLAIN_TYPES:
            return values.to(PLAIN_TYPES[self.type]).float()
        return BLOCK_TYPES[self.type].nearest(values.nan_to_num())  # 0 / 0 in blocks of zeros

    def with_elements(self, tensors: Mapping[str, Tensor], elements: Tensor) -> dict[str, Tensor]:
        weight = tensors["weight"]
        if self.type in PLAIN_TYPES:
            return {"weight": elements.to(PLAIN_TYPES[self.type])}
        kind = BLOCK_TYPES[self.type]
        blocks = kind.with_elements(weight.reshape(-1, kind.size), elements.reshape(-1, kind.numbers))
        return {"weight": blocks.view(len(weight), -1)}

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        weight = tensors["weight"]
        if self.type in PLAIN_TYPES:
            return None if bool(weight.isfinite().all()) else f"weight: found numbers beyond {self.type}"
        kind = BLOCK_TYPES[self.type]
        if kind.is_finite(weight.reshape(-1, kind.size)):
            return None
        return "weight: found scales that are infinite or NaN, expected numbers (in FP16 up to 65504)"


def _importance_of(columns: Tensor, start: int, blocks: Tensor) -> Tensor:
    """The importance of each number of some blocks, [blocks, numbers].

    Args:
        columns: importance of the columns, float32 [in]
        start: number of the first block, counted from the beginning of a row
    """
    # A column that no input has reached keeps a small weight, so that its numbers are not arbitrary.
    by_block = columns.to(blocks.device).clamp(min=float(columns.mean()) * LEAST_IMPORTANCE).view(-1, blocks.shape[1])
    return by_block[torch.arange(start, start + len(blocks), device=blocks.device) % len(by_block)]


@dataclass(frozen=True)
class StoredGguf(Format):
    """A weight in any type that the `gguf` package dequantizes, as a file holds it; it is only read.

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
        if not blocks.numel():
            return torch.zeros(len(blocks) * self.row_multiple, math.prod(self.shape[1:]), device=blocks.device)
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
