"""The contract of a format: how one weight matrix is represented, and how to get there in bounded memory.

A format works on the rows of a weight, so that a matrix of any size passes through a tile of fixed size, and on a
*group* of weights, because a runtime that fuses linears (`to_q, to_k, to_v`) merges their scales:

    fitted = fmt.fit([rows_of_q, rows_of_k, rows_of_v], inputs)   # what the group shares; may scan the rows
    fmt.constants(fitted)                                           # tensors that do not depend on rows
    fmt.quantize_rows(tile, fitted)                                 # tensors of these rows, for each tile
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "TILE_ELEMENTS",
    "ElementFormat",
    "Format",
    "InputStatistics",
    "QuantizingFormat",
    "TensorLayout",
    "TensorRows",
    "WeightRows",
    "iterate_rows",
    "sample_rows",
    "tile_ranges",
    "weight_amax",
]

#: In float32 4 MiB: with its scratch, a tile fits the third-level cache of a few cores.
TILE_ELEMENTS = 1 << 20
SAMPLE_RUN = 8


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a quantized weight.

    `rows_per_entry` is how many rows of the weight one row of this tensor stands for; 0 for a tensor that belongs to
    the whole weight and comes from `Format.constants`.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows_per_entry: int = 1


class InputStatistics(Protocol):
    """What calibration knows about the inputs of a group; see `convert/statistics.py`."""

    def amax(self) -> float:
        """Largest magnitude seen, over prompts and denoising steps."""
        ...

    def channel_amax(self) -> Tensor:
        """Largest magnitude per input channel, float32 [in]."""
        ...

    def rows(self) -> Tensor:
        """A sample of input rows, bfloat16 [samples, in]."""
        ...

    def clip(self, rule: str, largest: float) -> float:
        """Magnitude at which to clip by `rule` (`max`, `percentile:P`, `mse`) for a grid that ends at `largest`."""
        ...


class WeightRows(Protocol):
    """Row-wise access to a weight that may be larger than memory."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, in the dtype in which they are stored."""
        ...


@dataclass(frozen=True)
class TensorRows:
    """A weight that is in memory, as `WeightRows`."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.weight.shape
        return out_features, in_features

    def read(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


def iterate_rows(weight: WeightRows, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Yields `(first row, rows)` in tiles of about a mebi-element whose row counts are a multiple of `multiple`."""
    for start, stop in tile_ranges(weight.shape, multiple):
        yield start, weight.read(start, stop)


def tile_ranges(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First row and row after the last of each tile of a tensor [rows, ...]; see `iterate_rows`."""
    rows, columns = shape[0], math.prod(shape[1:])
    step = max(1, TILE_ELEMENTS // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def sample_rows(weights: Sequence[WeightRows], count: int) -> Tensor:
    """About `count` rows of a group, in short runs spread evenly over its members, or all if there are no more.

    Returns:
        [rows, in], in the dtype in which they are stored
    """
    total = sum(weight.shape[0] for weight in weights)
    run, stride = (SAMPLE_RUN, -(-total // count) * SAMPLE_RUN) if total > count else (total, total)
    return torch.cat(
        [
            weight.read(start, min(start + run, weight.shape[0]))
            for weight in weights
            for start in range(0, weight.shape[0], stride)
        ]
    )


def weight_amax(weights: Sequence[WeightRows]) -> float:
    """Largest magnitude in a group of weights; NaN and Inf come through, for the caller to refuse."""
    largest = 0.0
    for weight in weights:
        for _, tile in iterate_rows(weight):
            low, high = torch.aminmax(tile)
            tile_amax = max(-float(low), float(high))
            if not tile_amax <= largest:  # true for NaN as well
                largest = tile_amax
    return largest


def _scale_flaw(suffix: str, scale: Tensor) -> str | None:
    """Why a tensor cannot be what its name says, if that is a scale: they are positive and finite."""
    if "scale" not in suffix or not scale.numel():
        return None
    if scale.dtype is torch.uint8:
        return "found the E8M0 byte 255 (NaN), expected 0 to 254" if int(scale.max()) == 255 else None
    low, high = (float(bound) for bound in torch.aminmax(scale.float()))
    if low > 0 and high < float("inf"):  # false for NaN, which comes through
        return None
    return f"found scales from {low:g} to {high:g}, expected positive finite ones"


def _code_flaw(codes: Tensor) -> str | None:
    """Why a weight cannot be what it says: E4M3 has two NaN, 0x7F and 0xFF; any byte of other codes is a number."""
    if codes.dtype is not torch.float8_e4m3fn or not codes.numel():
        return None
    if int(codes.view(torch.int8).max()) == 0x7F or int(codes.view(torch.uint8).max()) == 0xFF:
        return "found E4M3 bytes that are NaN, expected numbers"
    return None


class Format(ABC):
    """What the tensors of a weight mean: all that reading needs. Immutable, with the format's options."""

    method: str
    #: Row tiles start and end (but for the last) at a multiple of this.
    row_multiple: int = 1

    @property
    def label(self) -> str:
        """The method, and what reports should tell beside it."""
        return self.method

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        """Tensors of a weight of this shape: suffix (`weight`, `weight_scale`, ...) to layout."""

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the weight that the tensors stand for, where it is not the matrix as which it is quantized."""
        return out_features, in_features

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that the tensors stand for, float32 [out, in]."""

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What makes the values of these tensors impossible in this format, or None; layouts are not looked at.

        Args:
            tensors: of a weight or of some of its rows
        """
        if "weight" in tensors and (reason := _code_flaw(tensors["weight"])):
            return f"weight: {reason}"
        return next(
            (f"{suffix}: {reason}" for suffix, scale in tensors.items() if (reason := _scale_flaw(suffix, scale))), None
        )


class QuantizingFormat(Format):
    """A format that we can bring a weight to."""

    #: What `fit` makes is so large, or takes so much memory to make, that only one may exist at a time.
    fits_alone: bool = False

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of this shape cannot be stored in this format, or None."""
        return None

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> Any:
        """Decides what a fused group shares: nothing, unless the format says so.

        Args:
            weights: members of the group, each [out_i, in]
            inputs: statistics of their common input, if calibrated
        """
        return None

    def constants(self, fitted: Any) -> dict[str, Tensor]:
        """Tensors with `rows_per_entry == 0`, equal for every member of the group."""
        return {}

    @abstractmethod
    def quantize_rows(self, rows: Tensor, fitted: Any) -> dict[str, Tensor]:
        """Tensors with `rows_per_entry > 0` for a tile of rows, any float dtype [rows, in]."""

    def quantize(self, weight: Tensor, inputs: InputStatistics | None = None) -> dict[str, Tensor]:
        """All tensors of one weight [out, in] that is in memory."""
        return self.quantize_fitted(weight, self.fit([TensorRows(weight)], inputs))

    def quantize_fitted(self, weight: Tensor, fitted: Any) -> dict[str, Tensor]:
        """As `quantize`, with what `fit` made of the weight's group.

        Tiles go to their places in the result: in memory is no second copy of it.
        """
        layouts = self.layout(*TensorRows(weight).shape)
        by_row = {
            suffix: torch.empty(layout.shape, dtype=layout.dtype, device=weight.device)
            for suffix, layout in layouts.items()
            if layout.rows_per_entry
        }
        for start, tile in iterate_rows(TensorRows(weight), self.row_multiple):
            for suffix, rows in self.quantize_rows(tile, fitted).items():
                first = start // layouts[suffix].rows_per_entry
                by_row[suffix][first : first + len(rows)] = rows
        return by_row | self.constants(fitted)


class ElementFormat(QuantizingFormat):
    """Elements times scales: with the scales decided, each element can be rounded by itself, as GPTQ does."""

    @abstractmethod
    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the elements in `weight` are multiplied with, mul_scale apart; float32, broadcasts to [rows, in]."""

    @abstractmethod
    def round_elements(self, values: Tensor) -> Tensor:
        """The nearest elements to numbers that were divided by their scales, float32 to float32 of any shape."""

    @abstractmethod
    def encode_elements(self, elements: Tensor) -> Tensor:
        """The tensor `weight` that holds these elements, float32 [rows, in]."""
