"""FP8: 8-bit floats (E4M3), one scale per weight, per row or per block of the weight.

Tensors:    NAME.weight            F8_E4M3 [out, in]
            NAME.weight_scale      F32 []                                 per tensor: amax / 448
            NAME.weight_scale      F32 [out]                              per channel: amax of the row / 448
            NAME.weight_scale_inv  F32 [ceil(out / N), ceil(in / K)]      per N x K block: amax / 448
            NAME.input_scale       F32 []                                 static activations: clip / 448
            E5M2                   the same per tensor with F8_E5M2 and amax / 57344
Arithmetic: W ≈ E4M3(code) * weight_scale; for blocks * weight_scale_inv, which multiplies despite its name.
            Codes are rounded half to even and saturate at ±448.
Consumers:  vLLM and vLLM-Omni `fp8`. Fused linears are requantized to the largest scale of their members, hence one
            scale for the group; static fused linears use the largest `input_scale`. Per channel: ModelOpt's
            FP8_PER_CHANNEL_PER_TOKEN, which vLLM and vLLM-Omni read as `modelopt`. E5M2: ComfyUI.
Limits:     per tensor none. Channels and blocks: activations are dynamic always (vLLM refuses static).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.encoding import PER_ROW, Encoding
from omni_convert.formats.arithmetic.float8 import (
    E4M3,
    E4M3_MAX,
    E5M2,
    E5M2_MAX,
    round_e4m3_,
    round_to_e4m3,
    round_to_e5m2,
)
from omni_convert.formats.arithmetic.input_codes import fp8_per_group, fp8_per_token, fp8_static
from omni_convert.formats.arithmetic.scalar_scale import SCALAR, scalars, static_scale
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.format import Calibration, CodedFormat, Format, QuantizingFormat
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows, weight_amax

__all__ = [
    "E4M3_MAX",
    "FP8",
    "FP8_E5M2",
    "FP8_PER_ROW",
    "Fp8",
    "Fp8Block",
    "Fp8Channel",
    "Fp8E5m2",
    "block_size_of",
    "fp8_block_size",
    "has_float_scale",
    "round_to_e4m3",
]

FP8 = Encoding(E4M3)
FP8_E5M2 = Encoding(E5M2)
FP8_PER_ROW = Encoding(E4M3, block=PER_ROW)
# Rows or columns of a block, the likely ones first.
BLOCK_SIZES = (128, 64, 32, 16, 256, 512, 1024)


def has_float_scale(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a layer has a weight in E4M3 whose scales are numbers, not bytes of E8M0."""
    scale = tensors.get("weight_scale")
    return tensors["weight"].dtype is torch.float8_e4m3fn and scale is not None and scale.dtype is not torch.uint8


def block_size_of(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, int]:
    """The power of two, from 16 up, that cuts `shape` into `blocks`; 128 where several do."""
    if not len(shape) == len(blocks) == 2:
        return BLOCK_SIZES[0], BLOCK_SIZES[0]  # any size will do: the layout will not match
    rows, columns = (
        next((size for size in BLOCK_SIZES if -(-length // size) == count), max(1, length))
        for length, count in zip(shape, blocks, strict=True)
    )
    return rows, columns


def fp8_block_size(fmt: Format) -> tuple[int, int] | None:
    """Rows and columns of a block of FP8 in blocks; None for every other format."""
    encoding = fmt.encoding
    if encoding is None or encoding != Encoding(E4M3, block=encoding.block):
        return None
    return encoding.block_size


@dataclass(frozen=True)
class _PerTensor(CodedFormat):
    """8-bit floats with one scale per weight (shared by a fused group).

    Attributes:
        static: store input_scale (static activations); needs statistics of the inputs
        input_scale_rule: how input_scale is chosen, see `InputStatistics.clip`
    """

    static: bool = False
    input_scale_rule: str = "max"

    method = "fp8"
    largest_input = E4M3_MAX
    dtype: ClassVar[torch.dtype]
    largest: ClassVar[float]

    @property
    def activation_scheme(self) -> str:
        return "static" if self.static else "dynamic"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        layout = {"weight": TensorLayout(self.dtype, (out_features, in_features)), "weight_scale": SCALAR}
        return layout | ({"input_scale": SCALAR} if self.static else {})

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> dict[str, float | None]:
        input_scale = static_scale(inputs, self.input_scale_rule, E4M3_MAX) if self.static else None
        return {"weight_scale": weight_amax(weights) / self.largest or 1.0, "input_scale": input_scale}

    def constants(self, fitted: dict[str, float | None]) -> dict[str, Tensor]:
        return scalars(**fitted)

    def quantize_rows(self, rows: Tensor, fitted: dict[str, float | None]) -> dict[str, Tensor]:
        scale = torch.tensor(fitted["weight_scale"], dtype=torch.float32, device=rows.device)
        return quantize_in_tiles(rows, lambda tile: {"weight": self._round(tile.float() / scale)})

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"].float()

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.static:
            return fp8_static(inputs, tensors["input_scale"], round_e4m3_).mul_(tensors["input_scale"])
        return _round_per_token(inputs)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight_scale"].float()

    def round_elements(self, values: Tensor) -> Tensor:
        return self._round(values).float()

    def encode_elements(self, elements: Tensor) -> Tensor:
        return elements.to(self.dtype)

    @abstractmethod
    def _round(self, values: Tensor) -> Tensor:
        """The nearest codes to float32 numbers, half to even, saturating."""


@dataclass(frozen=True)
class Fp8(_PerTensor):
    """FP8 with one scale per weight, in E4M3."""

    dtype = torch.float8_e4m3fn
    largest = E4M3_MAX
    activation_schemes: ClassVar[tuple[str, ...]] = ("dynamic", "static")
    calibration = Calibration.INPUT_SCALE
    options: ClassVar[tuple[str, ...]] = ("input_scale", "weight_block_size", "element")
    config_fields: ClassVar[tuple[str, ...]] = ("weight_block_size", "per_channel")

    @classmethod
    def build(cls, options: FormatOptions) -> QuantizingFormat:
        """E5M2, and FP8 in blocks or per row, where the options say so.

        Raises:
            RecipeError: E5M2 in blocks.
        """
        if options.element == "e5m2":
            if options.weight_block_size is not None:
                raise RecipeError("--element e5m2: found with --weight-block-size, expected one of the two")
            return Fp8E5m2(options.static, options.input_scale)
        if options.weight_block_size is not None:
            return Fp8Block(options.weight_block_size)
        if options.per_channel:
            return Fp8Channel()
        return cls(options.static, options.input_scale)

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> Format | None:
        weight = tensors["weight"]
        if weight.dtype is torch.float8_e4m3fn and (inverse := tensors.get("weight_scale_inv")) is not None:
            return Fp8Block(block_size_of(weight.shape, inverse.shape))
        if not has_float_scale(tensors):
            return None
        is_per_row = 1 < weight.shape[0] == tensors["weight_scale"].elements
        return Fp8Channel() if is_per_row else cls(static="input_scale" in tensors)

    @property
    def encoding(self) -> Encoding:
        return FP8

    @property
    def label(self) -> str:
        return "fp8 static" if self.static else "fp8"

    def _round(self, values: Tensor) -> Tensor:
        return round_to_e4m3(values)


@dataclass(frozen=True)
class Fp8E5m2(_PerTensor):
    """FP8 with one scale per weight, in E5M2: more range, which a scale makes up for, and fewer digits."""

    dtype = torch.float8_e5m2
    largest = E5M2_MAX

    @property
    def encoding(self) -> Encoding:
        return FP8_E5M2

    @property
    def label(self) -> str:
        return "fp8 e5m2 static" if self.static else "fp8 e5m2"

    def _round(self, values: Tensor) -> Tensor:
        return round_to_e5m2(values)


@dataclass(frozen=True)
class Fp8Channel(CodedFormat):
    """FP8 with one scale per row, and activations per token; nothing is shared in a fused group."""

    method = "fp8"

    @property
    def encoding(self) -> Encoding:
        return FP8_PER_ROW

    @property
    def label(self) -> str:
        return "fp8 per row"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout(torch.float8_e4m3fn, (out_features, in_features)),
            "weight_scale": TensorLayout(torch.float32, (out_features,)),
        }

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        return quantize_in_tiles(rows, self._quantize_tile)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float() * self.element_scale(tensors)

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return _round_per_token(inputs)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight_scale"].float()[:, None]

    def round_elements(self, values: Tensor) -> Tensor:
        return round_to_e4m3(values).float()

    def encode_elements(self, elements: Tensor) -> Tensor:
        return elements.to(torch.float8_e4m3fn)

    @staticmethod
    def _quantize_tile(tile: Tensor) -> dict[str, Tensor]:
        values = tile.float()
        scale = values.abs().amax(dim=1) / E4M3_MAX
        scale = torch.where(scale == 0, 1.0, scale)
        return {"weight": round_to_e4m3(values / scale[:, None]), "weight_scale": scale}


@dataclass(frozen=True)
class Fp8Block(CodedFormat):
    """FP8 with one scale per block of `block_size = (N, K)` elements; nothing is shared in a fused group."""

    block_size: tuple[int, int] = (128, 128)

    method = "fp8"

    def with_block_size(self, sizes: tuple[int, int]) -> Format:
        return replace(self, block_size=sizes)

    @property
    def row_multiple(self) -> int:  # type: ignore[override]  # a class attribute elsewhere, here it follows the block
        return self.block_size[0]

    @property
    def encoding(self) -> Encoding:
        return Encoding(E4M3, block=self.block_size)

    @property
    def label(self) -> str:
        return "fp8 {}x{}".format(*self.block_size)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        rows, columns = self.block_size
        blocks = (-(-out_features // rows), -(-in_features // columns))
        return {
            "weight": TensorLayout(torch.float8_e4m3fn, (out_features, in_features)),
            "weight_scale_inv": TensorLayout(torch.float32, blocks, rows_per_entry=rows),
        }

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        blocks = self._blocks(rows.float())  # [row blocks, N, column blocks, K]
        scale = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
        scale = torch.where(scale == 0, 1.0, scale)
        codes = round_to_e4m3(blocks / scale[:, None, :, None])
        return {"weight": self._unblock(codes, rows.shape), "weight_scale_inv": scale}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"]
        blocks = self._blocks(weight.float()) * tensors["weight_scale_inv"].float()[:, None, :, None]
        return self._unblock(blocks, weight.shape)

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        values, scale = fp8_per_group(inputs, self.block_size[1], round_e4m3_)
        return values.mul_(scale).flatten(1)[:, : inputs.shape[1]]

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        rows, columns = tensors["weight"].shape
        scale = tensors["weight_scale_inv"].float().repeat_interleave(self.block_size[1], dim=1)[:, :columns]
        return scale.repeat_interleave(self.block_size[0], dim=0)[:rows]

    def round_elements(self, values: Tensor) -> Tensor:
        return round_to_e4m3(values).float()

    def encode_elements(self, elements: Tensor) -> Tensor:
        return elements.to(torch.float8_e4m3fn)

    def _blocks(self, values: Tensor) -> Tensor:
        """[rows, columns] to [row blocks, N, column blocks, K], the last blocks padded with zeros."""
        rows, columns = values.shape
        height, width = min(self.block_size[0], max(rows, 1)), min(self.block_size[1], max(columns, 1))
        padded = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
        return padded.view(-1, height, padded.shape[1] // width, width)

    @staticmethod
    def _unblock(blocks: Tensor, shape: torch.Size) -> Tensor:
        rows, columns = shape
        return blocks.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()


def _round_per_token(inputs: Tensor) -> Tensor:
    values, scale = fp8_per_token(inputs, round_e4m3_)
    return values.mul_(scale)
