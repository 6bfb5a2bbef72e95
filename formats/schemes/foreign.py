"""Formats that other tools write and that are only read here.

Scaled      NAME.weight             any element type [out, in]: E4M3, E5M2, 8-bit integers, 4-bit codes one a byte
            NAME.weight_scale       F32 [out, ceil(in / group)], one number for each row and group of columns
            NAME.weight_zero_point  F32 of that shape, where codes are not symmetric
            W = (code - zero point) * scale, or code * scale + zero point
Spread      NAME.weight             E4M3, E5M2 or I8 of three dimensions or more: experts [E, out, in], convolutions
            NAME.weight_scale       F32, one number, or for each dimension 1, the same size, or a number of blocks
LowRank     another format's tensors, and
            NAME.lora_a             F32 [rank, in]
            NAME.lora_b             F32 [out, rank]; W = W' + lora_b lora_a
Smoothed    another format's tensors, and
            NAME.mul_scale          F32 [in], which the runtime multiplies activations with; W = W' * mul_scale
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.element import ElementType, IntegerType
from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.float8 import E4M3, E5M2
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout

__all__ = ["LowRank", "Scaled", "Smoothed", "Spread"]

FLOATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


@dataclass(frozen=True)
class Scaled(Format):
    """Elements with a scale for each row, or for each group of its columns.

    Attributes:
        method: the name that users know
        dtype: of the elements
        group: columns that share a scale; None for the whole row
        has_zero_point: there is one for each scale
        adds_zero_point: it is added to the scaled code, not subtracted from the code
        symmetric: the file says that every zero point is the middle code
        static: the layer stores NAME.input_scale, F32 []
    """

    method: str
    dtype: torch.dtype = torch.float8_e4m3fn
    group: int | None = None
    has_zero_point: bool = False
    static: bool = False
    symmetric: bool = False
    adds_zero_point: bool = False

    @property
    def encoding(self) -> Encoding:
        is_symmetric = self.symmetric or not self.has_zero_point
        return Encoding(
            self._element, block=(1, self.group), has_zero_point=self.has_zero_point, is_symmetric=is_symmetric
        )

    @property
    def _element(self) -> ElementType | IntegerType:
        bits = self.method.removeprefix("int")
        return FLOATS.get(self.dtype) or IntegerType(int(bits), is_signed=self.dtype is not torch.uint8)

    @property
    def activation_scheme(self) -> str:
        if self.static:
            return "static"
        return "dynamic" if self.dtype in FLOATS else "none"

    @property
    def label(self) -> str:
        return f"{self.method} per row" if self.group is None else f"{self.method} group {self.group}"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        groups = -(-in_features // self.group) if self.group else 1
        scales = TensorLayout(torch.float32, (out_features, groups))
        layout = {"weight": TensorLayout(self.dtype, (out_features, in_features)), "weight_scale": scales}
        if self.has_zero_point:
            layout["weight_zero_point"] = scales
        if self.static:
            layout["input_scale"] = TensorLayout(torch.float32, (), rows_per_entry=0)
        return layout

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = tensors["weight"].float()
        columns = values.shape[1]
        scales = self._spread(tensors["weight_scale"].float(), columns)
        if not self.has_zero_point:
            return values * scales
        zeros = self._spread(tensors["weight_zero_point"], columns)
        return values * scales + zeros if self.adds_zero_point else (values - zeros) * scales

    def _spread(self, numbers: Tensor, columns: int) -> Tensor:
        return numbers if self.group is None else numbers.repeat_interleave(self.group, dim=1)[:, :columns]


@dataclass(frozen=True)
class Spread(Format):
    """Elements of a weight of three dimensions or more, times scales for blocks of any of these.

    Other code sees the weight as the matrix [first dimension, rest].

    Attributes:
        method: the name that users know
        dtype: of the elements
        dimensions: of the weight after the first
        block: entries of each of these that share a scale
        is_shared: all of the first dimension shares its scales; otherwise each entry has its own
    """

    method: str
    dtype: torch.dtype
    dimensions: tuple[int, ...]
    block: tuple[int, ...]
    is_shared: bool

    @property
    def encoding(self) -> Encoding:
        return Encoding(FLOATS.get(self.dtype) or IntegerType(8), block=(None if self.is_shared else 1, None))

    @property
    def activation_scheme(self) -> str:
        return "none"

    @property
    def label(self) -> str:
        return f"{self.method} of {len(self.dimensions) + 1} dimensions"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        scales = tuple(-(-size // block) for size, block in zip(self.dimensions, self.block, strict=True))
        first, rows_per_entry = (1, 0) if self.is_shared else (out_features, 1)
        return {
            "weight": TensorLayout(self.dtype, self.weight_shape(out_features, in_features)),
            "weight_scale": TensorLayout(torch.float32, (first, *scales), rows_per_entry),
        }

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return out_features, *self.dimensions

    def with_block_size(self, sizes: tuple[int, int]) -> Format:
        last = zip(self.block[-2:], self.dimensions[-2:], sizes, strict=True)
        blocks = (size if block in (1, size) else declared for block, size, declared in last)
        return replace(self, block=(*self.block[:-2], *blocks))

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scales = tensors["weight_scale"].float()
        for dimension, (size, block) in enumerate(zip(self.dimensions, self.block, strict=True), start=1):
            scales = scales.repeat_interleave(block, dim=dimension).narrow(dimension, 0, size)
        return (tensors["weight"].float() * scales).flatten(1)


@dataclass(frozen=True)
class _Wrapped(Format):
    """Another format, whose numbers stand for the weight only after a further step."""

    inner: Format

    @property
    def method(self) -> str:  # type: ignore[override]  # a class attribute elsewhere, here it follows the inner format
        return self.inner.method

    @property
    def row_multiple(self) -> int:  # type: ignore[override]  # follows the inner format
        return self.inner.row_multiple

    @property
    def activation_scheme(self) -> str:
        return self.inner.activation_scheme

    @property
    def innermost(self) -> Format:
        return self.inner.innermost


@dataclass(frozen=True)
class Smoothed(_Wrapped):
    """Another format, whose layer multiplies its inputs by `mul_scale`; the weight's columns were divided by it."""

    @property
    def encoding(self) -> Encoding | None:
        inner = self.inner.encoding
        return None if inner is None else replace(inner, is_smoothed=True)

    @property
    def label(self) -> str:
        return f"{self.inner.label}, smoothed"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        mul_scale = TensorLayout(torch.float32, (in_features,), rows_per_entry=0)
        return self.inner.layout(out_features, in_features) | {"mul_scale": mul_scale}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.inner.dequantize(tensors) * tensors["mul_scale"]


@dataclass(frozen=True)
class LowRank(_Wrapped):
    """Another format, for what is left of a weight without its largest singular values (SVDQuant).

    Attributes:
        rank: of what was taken out
    """

    rank: int

    @property
    def label(self) -> str:
        return f"{self.inner.label} with rank {self.rank}"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return self.inner.layout(out_features, in_features) | {
            "lora_a": TensorLayout(torch.float32, (self.rank, in_features), rows_per_entry=0),
            "lora_b": TensorLayout(torch.float32, (out_features, self.rank)),
        }

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.inner.dequantize(tensors) + tensors["lora_b"] @ tensors["lora_a"]
