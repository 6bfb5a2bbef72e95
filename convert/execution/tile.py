"""Tiles: the rows of a tensor that are read, quantized and written at a time, and where their bytes go.

How a step is cut into tiles depends on the plan alone, never on the machine. So any number of workers or runs makes
the same tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from omni_convert.convert.plan.steps import CopyStep, QuantizeStep, Step, matrix_shape
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout, tile_ranges

__all__ = ["Tile", "sampled_rows", "tiles_of"]

# The error of a weight of several tiles is measured over one row in so many, from every tile. The result is within
# about 1 % of the full error. It takes a tenth of the time of quantizing; the full error takes three times that time.
ERROR_SAMPLE = 32


@dataclass(frozen=True)
class Tile:
    """Rows of one source tensor.

    Attributes:
        source: the tensor
        start, stop: first row, and the row after the last; 0 and 1 for a tensor without dimensions
        ranges: output tensor → its rows that are made of this tile: the first, and the one after the last
        is_whole: there is no other tile of this tensor
    """

    source: TensorSpec
    start: int
    stop: int
    ranges: dict[str, tuple[int, int]]
    is_whole: bool

    @property
    def nbytes(self) -> int:
        """Bytes that the tile has in the source."""
        rows = self.source.shape[0] if self.source.shape else 1
        return self.source.nbytes * (self.stop - self.start) // rows if rows else 0


def tiles_of(step: Step) -> list[Tile]:
    """The tiles of a step, in the order in which the source holds them."""
    if isinstance(step, CopyStep):
        return _tiles_to_copy(step)
    return [
        tile
        for stem, weight in zip(step.group.members, step.weights, strict=True)
        for tile in _tiles_to_quantize(stem, weight, step)
    ]


def _tiles_to_quantize(stem: str, weight: TensorSpec, step: QuantizeStep) -> list[Tile]:
    layouts = step.layout(weight)
    rows = list(tile_ranges(weight.shape, math.lcm(step.format.row_multiple, step.spelling(weight).row_multiple)))
    return [
        Tile(
            weight,
            start,
            stop,
            {
                f"{stem}.{suffix}": _output_rows(layout, start, stop, is_last=stop == weight.shape[0])
                for suffix, layout in layouts.items()
                if layout.rows_per_entry or not start  # the first tile brings the tensors of the whole weight
            }
            | ({step.biases[stem].name: (start, stop)} if stem in step.biases else {}),
            len(rows) == 1,
        )
        for start, stop in rows
    ]


def _output_rows(layout: TensorLayout, start: int, stop: int, *, is_last: bool) -> tuple[int, int]:
    """The rows of a stored tensor that belong to rows of the weight; the last ones bring the padding, if any."""
    if not layout.rows_per_entry:
        return 0, layout.shape[0] if layout.shape else 1
    rows = layout.entries_of(start, stop)
    return rows.start, layout.shape[0] if is_last else rows.stop


def _tiles_to_copy(step: CopyStep) -> list[Tile]:
    (output,) = step.outputs()
    rows = list(tile_ranges(output.shape)) if output.shape and output.elements else [(0, 1)]
    return [Tile(step.tensor, start, stop, {output.name: (start, stop)}, len(rows) == 1) for start, stop in rows]


def sampled_rows(
    tile: Tile, rows: Tensor, tensors: Mapping[str, Tensor], fmt: Format
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leading rows of a tile and their stored tensors, to measure the error; all rows if the weight has one tile."""
    multiple = fmt.row_multiple
    count = len(rows) if tile.is_whole else min(len(rows), -(-len(rows) // (ERROR_SAMPLE * multiple)) * multiple)
    layouts = fmt.layout(*matrix_shape(tile.source))
    return rows[:count], {suffix: tensor[layouts[suffix].entries_of(0, count)] for suffix, tensor in tensors.items()}
