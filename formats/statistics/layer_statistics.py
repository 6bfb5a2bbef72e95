"""Statistics of the input of one linear layer, and their recording.

Maxima, integer sums and the rows with the smallest hashes merge exactly in any order and grouping. So two batches give
the same bits whether they are recorded together or apart, on one machine or on two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.statistics import histogram
from omni_convert.formats.statistics.row_sample import (
    VALUES_PER_WORD,
    hash_words,
    merged_rows,
    pack_rows,
    smallest_hashes,
)
from omni_convert.formats.statistics.square_sums import carry, mean_squares, square_sums

__all__ = ["SAMPLE_ROWS", "InputRecorder", "LayerStatistics", "Observation", "observe"]

SAMPLE_ROWS = 64
#: Elements that are measured at a time: on a CPU few enough for its cache.
TILE_ELEMENTS = {"cpu": 1 << 18}
DEVICE_TILE_ELEMENTS = 1 << 26


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of one input; satisfies `formats.format.InputStatistics`.

    Attributes:
        step_amax: largest magnitude by denoising step, float32 [steps]; 0 for a step in which the layer did not run.
            A text encoder runs before the first step and is recorded there.
        channels: largest magnitude by input channel, float32 [in]
        histogram: number of values by magnitude, int64 [1027]; see `histogram`
        sample: rows with the smallest hashes, in the order of these, bfloat16 [<= 64, in]
        squares: sums of squares by input channel, int64 [2, in], see `square_sums`; None if they were not recorded
        sample_runs: prompt and denoising step of each row of the sample, int64 [<= 64, 2]; None if they were not
            recorded
    """

    step_amax: Tensor
    channels: Tensor
    histogram: Tensor
    sample: Tensor
    squares: Tensor | None
    sample_runs: Tensor | None

    def amax(self) -> float:
        return float(self.channels.max())

    def channel_amax(self) -> Tensor:
        return self.channels

    def mean_square(self) -> Tensor:
        """The mean square of each input channel, float32 [in].

        Raises:
            CalibrationError: an earlier version recorded the statistics, without squares.
        """
        if self.squares is None:
            raise CalibrationError(
                "the statistics: found no mean squares, expected them for the importance of columns; calibrate again"
            )
        return mean_squares(self.squares, self.rows_seen)

    def rows(self) -> Tensor:
        return self.sample

    def row_runs(self) -> Tensor | None:
        return self.sample_runs

    def clip(self, rule: str, largest: float) -> float:
        """Magnitude at which to clip.

        Args:
            rule: `max`, `percentile:P` with 0 < P <= 100, or `mse`
            largest: end of the grid: 448 for E4M3, 127 for int8

        Raises:
            RecipeError: there is no such rule.
        """
        if rule == "max":
            return self.amax()
        if rule == "mse":
            return histogram.mse_clip(self.histogram, self.amax(), largest)
        return self.percentile(_percent(rule))

    def percentile(self, percent: float) -> float:
        """The magnitude that `percent` of the values do not exceed, to a sixteenth of an octave upwards."""
        return histogram.percentile(self.histogram, percent, self.amax())

    @property
    def values_seen(self) -> int:
        return int(self.histogram.sum())

    @property
    def rows_seen(self) -> int:
        return self.values_seen // self.channels.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the statistics file, by suffix."""
        squares = {} if self.squares is None else {"channel_squares": self.squares}
        runs = {} if self.sample_runs is None else {"row_runs": self.sample_runs}
        return {
            "step_amax": self.step_amax,
            "channel_amax": self.channels,
            "histogram": self.histogram,
            "rows": self.sample,
            **squares,
            **runs,
        }

    @staticmethod
    def merged(parts: Iterable[LayerStatistics]) -> LayerStatistics:
        """Merges statistics; there is at least one part, and all have the same width.

        The result has sums of squares, and the runs of rows, if all parts have them.
        """
        everything = list(parts)
        steps = max(part.step_amax.shape[0] for part in everything)
        step_amax = torch.zeros(steps)
        for part in everything:
            covered = step_amax[: part.step_amax.shape[0]]
            torch.maximum(covered, part.step_amax, out=covered)
        rows, runs = merged_rows([(part.sample, part.sample_runs) for part in everything], SAMPLE_ROWS)
        squares = [part.squares for part in everything if part.squares is not None]
        return LayerStatistics(
            step_amax,
            torch.stack([part.channels for part in everything]).amax(0),
            torch.stack([part.histogram for part in everything]).sum(0),
            rows,
            carry(torch.stack(squares).sum(0)) if len(squares) == len(everything) else None,
            runs,
        )


def _percent(rule: str) -> float:
    name, _, argument = rule.partition(":")
    try:
        percent = float(argument)
    except ValueError:
        percent = math.nan
    if name != "percentile" or not 0 < percent <= 100:
        raise RecipeError(f"input scale: found '{rule}', expected max, mse or percentile:P with 0 < P <= 100")
    return percent


@dataclass(frozen=True)
class Observation:
    """The measurements of one input.

    Attributes:
        amax: largest magnitude; NaN or infinity if any value is
        channels: largest magnitude by channel, float32 [in]
        codes: number of values by code, int64 [4096]
        squares: sums of squares by channel, int64 [2, in]
        hashes: hash of each row, int64 [rows]
        rows: the input itself, [rows, in]
    """

    amax: float
    channels: Tensor
    codes: Tensor
    squares: Tensor
    hashes: Tensor
    rows: Tensor


def observe(values: Tensor) -> Observation:
    """Measures an input, any float dtype [rows, in] with at least one row, in tiles that need little memory."""
    tiles = [_observe_tile(values[tile]) for tile in _tiles(values)]
    channels, codes, squares, hashes = tiles[0] if len(tiles) == 1 else _joined(tiles)
    return Observation(float(channels.max()), channels, codes, squares, hashes, values)


def _tiles(values: Tensor) -> Iterator[slice]:
    step = max(1, TILE_ELEMENTS.get(values.device.type, DEVICE_TILE_ELEMENTS) // values.shape[1])
    return (slice(start, start + step) for start in range(0, values.shape[0], step))


def _observe_tile(tile: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Channel amax, counts by code, sums of squares and hashes of some rows; NaN and infinity show in the amax."""
    words = pack_rows(tile.to(torch.bfloat16))
    return tile.abs().amax(0).float(), _count(tile, words), square_sums(tile), hash_words(words)


def _joined(tiles: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, codes, squares, hashes = zip(*tiles, strict=True)
    return torch.stack(channels).amax(0), torch.stack(codes).sum(0), torch.stack(squares).sum(0), torch.cat(hashes)


def _count(tile: Tensor, words: Tensor) -> Tensor:
    if tile.dtype != torch.bfloat16:
        return histogram.count_floats(tile.float())
    counts = histogram.count_words(words)
    counts[0] -= words.numel() * VALUES_PER_WORD - tile.numel()  # the zeros that pad the rows
    return counts


class InputRecorder:
    """Accumulates the observations of one input."""

    def __init__(self) -> None:
        self._step_amax: dict[int, float] = {}
        self._channels: Tensor | None = None
        self._codes: Tensor | None = None
        self._squares: Tensor | None = None
        # The sample so far, followed by candidates for it, which are sorted only when there are enough of them.
        self._rows: list[Tensor] = []
        self._hashes: list[Tensor] = []
        self._runs: list[Tensor] = []
        self._pending = 0
        # Rows with a larger hash cannot enter the sample; None while the sample is not full.
        self._bound: int | None = None

    def record(self, observation: Observation, step: int, prompt: int = 0) -> None:
        """Adds the finite values of a denoising step, counted from 0.

        Args:
            prompt: a number that tells the prompt from others, in 63 bits
        """
        assert math.isfinite(observation.amax), "the caller refuses NaN and infinity"
        self._step_amax[step] = max(self._step_amax.get(step, 0.0), observation.amax)
        if self._channels is None or self._codes is None or self._squares is None:
            self._channels, self._codes = observation.channels.clone(), observation.codes.clone()
            self._squares = carry(observation.squares)
        else:
            torch.maximum(self._channels, observation.channels, out=self._channels)
            self._codes += observation.codes
            self._squares = carry(self._squares + observation.squares)
        self._sample(observation.hashes, observation.rows, (prompt, step))

    def statistics(self) -> LayerStatistics | None:
        """The statistics so far, on the CPU; None if nothing was recorded."""
        if self._channels is None or self._codes is None or self._squares is None:
            return None
        self._compact()
        step_amax = torch.zeros(max(self._step_amax) + 1)
        for step, amax in self._step_amax.items():
            step_amax[step] = amax
        counts = histogram.fold_codes(self._codes)
        sample, squares, runs = self._rows[0].cpu(), self._squares.cpu(), self._runs[0].cpu()
        return LayerStatistics(step_amax, self._channels.cpu(), counts.cpu(), sample, squares, runs)

    def _sample(self, hashes: Tensor, rows: Tensor, run: tuple[int, int]) -> None:
        if self._bound is None:
            candidates = smallest_hashes(hashes, SAMPLE_ROWS)
        else:
            candidates = (hashes <= self._bound).nonzero()[:, 0]
        if candidates.numel() == 0:
            return
        # Indexing copies: the input itself is not kept.
        self._hashes.append(hashes[candidates])
        self._rows.append(rows[candidates].to(torch.bfloat16))
        self._runs.append(torch.tensor([run], device=hashes.device).repeat(candidates.numel(), 1))
        self._pending += candidates.numel()
        if self._pending >= SAMPLE_ROWS:
            self._compact()

    def _compact(self) -> None:
        hashes, rows, runs = torch.cat(self._hashes), torch.cat(self._rows), torch.cat(self._runs)
        kept = smallest_hashes(hashes, SAMPLE_ROWS, runs)
        self._hashes, self._rows, self._runs, self._pending = [hashes[kept]], [rows[kept]], [runs[kept]], 0
        self._bound = int(hashes[kept[-1]]) if kept.numel() == SAMPLE_ROWS else None
