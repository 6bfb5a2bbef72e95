"""The rows of a weight, and the tiles in which every format, check and writer walks through them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "TILE_ELEMENTS",
    "InputColumns",
    "InputStatistics",
    "TensorLayout",
    "TensorRows",
    "WeightRows",
    "iterate_rows",
    "recorded_mean_square",
    "sample_rows",
    "tile_ranges",
    "weight_amax",
]


#: Elements of a tile, 4 MiB in float32: with its scratch, it fits the third-level cache of a few cores.
TILE_ELEMENTS = 1 << 20
SAMPLE_RUN = 8


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a quantized weight.

    Attributes:
        rows_per_entry: how many rows of the weight `entries` rows of this tensor stand for; 0 for a tensor that belongs
            to the whole weight and comes from `Format.constants`
        entries: more than one where the tensor is flat, so that a row of the weight is several of its rows
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows_per_entry: int = 1
    entries: int = 1

    def entries_of(self, start: int, stop: int) -> slice:
        """The rows of this tensor that stand for rows `start` to `stop` of the weight, unless it belongs to all."""
        share = self.rows_per_entry or 1
        return slice(start * self.entries // share, -(-stop * self.entries // share))


class InputStatistics(Protocol):
    """Statistics of the inputs of a group, from calibration; see `formats/statistics/statistics.py`."""

    def amax(self) -> float:
        """Largest magnitude seen, over prompts and denoising steps."""
        ...

    def channel_amax(self) -> Tensor:
        """Largest magnitude per input channel, float32 [in]."""
        ...

    def mean_square(self) -> Tensor:
        """Mean square per input channel, float32 [in]."""
        ...

    def rows(self) -> Tensor:
        """A sample of input rows, bfloat16 [samples, in]."""
        ...

    def row_runs(self) -> Tensor | None:
        """Prompt (as a number) and denoising step of each of these rows, int64 [samples, 2]; None if unknown."""
        ...

    def clip(self, rule: str, largest: float) -> float:
        """Magnitude at which to clip by `rule` (`max`, `percentile:P`, `mse`) for a grid that ends at `largest`."""
        ...


def recorded_mean_square(inputs: InputStatistics) -> Tensor:
    """Mean square per input channel, float32 [in]; of the sample of rows in files of earlier versions."""
    return inputs.rows().float().square().mean(0) if inputs.row_runs() is None else inputs.mean_square()


@dataclass(frozen=True)
class InputColumns:
    """The statistics of some columns of an input, as `InputStatistics`.

    Attributes:
        whole: those of the input
        start, stop: the first of the columns, and the one after the last
    """

    whole: InputStatistics
    start: int
    stop: int

    def amax(self) -> float:
        return float(self.channel_amax().max())

    def channel_amax(self) -> Tensor:
        return self.whole.channel_amax()[self.start : self.stop]

    def mean_square(self) -> Tensor:
        return self.whole.mean_square()[self.start : self.stop]

    def rows(self) -> Tensor:
        return self.whole.rows()[:, self.start : self.stop]

    def row_runs(self) -> Tensor | None:
        return self.whole.row_runs()

    def clip(self, rule: str, largest: float) -> float:
        """See `InputStatistics`; not above the largest magnitude of these columns."""
        return min(self.whole.clip(rule, largest), self.amax())


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
