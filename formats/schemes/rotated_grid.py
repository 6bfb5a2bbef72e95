"""W4A8 and W6A8 (ComfyUI's `asym_w4a8_int8`): few levels per group on an INT8 grid per row, of a rotated weight.

Tensors:    NAME.weight           U8      [out, in / 2] or [out, 3 in / 4]   packed codes, see below
            NAME.weight_scale     F8_E4M3 [out, in / 16]    step of a group, relative to the row's
            NAME.weight_scale_2   F32     [out, 1]          step of the row's INT8 grid
            NAME.weight_codebook  F32     [16]              W4A8 alone: the levels, sorted
Arithmetic: W' ≈ v * weight_scale_2 with v = clamp(rne(level * weight_scale), ±127), where level is codebook[code]
            (W4A8) or code - 32 (W6A8), and W' is the weight rotated in groups of columns (`arithmetic/rotation.py`).
            The runtime multiplies v by INT8 inputs, which it rotates and quantizes per token.
Codes:      the low four bits of two columns a byte, even column in the low nibble; W6A8 then has the upper two bits
            of four columns a byte, the first column lowest
Consumers:  ComfyUI 0.31 with comfy-kitchen 0.2.31 (W4A8) or 0.2.36 (W6A8), SM 8.0
Scales:     two rounds of least squares, then the E4M3 neighbours that fit a group best, and for W4A8 a few steps of
            the row's grid. Without search, the tensors are comfy-kitchen's with its fixed codebook.
Limits:     in % 16 == 0, for W6A8 in % 32 == 0

Encoding puts the 16 positions of a group first, `[16, rows, groups]`, so that every step works on long runs of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import unpack_nibbles
from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import PER_ROW, Encoding
from omni_convert.formats.arithmetic.rotation import rotate
from omni_convert.formats.arithmetic.search import LevelTable, best_attempt, is_greater, nearest_level
from omni_convert.formats.arithmetic.tiling import CACHED_ELEMENTS, quantize_in_tiles
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.int8 import RotatedInt8
from omni_convert.formats.schemes.rotated import RotatedFormat

__all__ = ["SCALE_GROUP", "W4A8", "W6A8", "W4a8", "W6a8"]

#: Columns that share a relative step.
SCALE_GROUP = 16
W4A8 = Encoding(IntegerType(4, is_signed=False), torch.float8_e4m3fn, (1, SCALE_GROUP), outer_block=PER_ROW)
W6A8 = replace(W4A8, element=IntegerType(6, is_signed=False))
GRID_MAX = 127
# Of W6A8.
LARGEST_LEVEL = 31
SMALLEST_SCALE = 1e-8
ROUNDS = 2
# comfy-kitchen's fixed levels, for which it has a fast kernel.
LEVELS = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
# Positive E4M3 bit patterns are in order; the last is 448.
SMALLEST_BITS, LARGEST_BITS = 1, 0x7E
# Steps of the row's grid to try, in units of the one that just holds its largest level.
GRID_FACTORS = (1.0, 0.91, 0.94, 0.97, 1.03, 1.06, 1.09, 1.12, 1.15)
# E4M3 steps to try around the fitted one.
NEIGHBOURS = (0, -1, 1)
# Distance of levels on the grid from which rounding leaves the nearest one among the two around a number.
SMALLEST_GAP = 1.125


class _Levels(Protocol):
    """The levels of a format.

    Attributes:
        numbers: sorted, float32 [levels]
        smallest_step: of a group, with which neighbouring levels are far enough apart on the row's grid
    """

    @property
    def numbers(self) -> Tensor: ...

    @property
    def smallest_step(self) -> float: ...

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest levels, float32; may overwrite the values."""
        ...

    def around(self, target: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two levels next to each other, one of which is the nearest on the row's grid.

        Args:
            target: the weight in steps of the row's grid [16, rows, groups]
            steps: of the groups, likewise [rows, groups]

        Returns:
            What `indices` asks for, and both levels, float32 [16, rows, groups]
        """
        ...

    def indices(self, found: Tensor) -> Tensor:
        """The indices of the lower levels of `around`, float32 [16, rows, groups]."""
        ...


@dataclass(frozen=True, eq=False)
class _TableLevels:
    """Those of W4A8.

    Attributes:
        table: the levels
        lower: the index of the level below the centre of a cell, float32 [cells]
        low, high: this level and the next, float32 [cells]
        smallest_step: see `_Levels`
    """

    table: LevelTable
    lower: Tensor
    low: Tensor
    high: Tensor
    smallest_step: float

    @classmethod
    def on(cls, device: torch.device) -> _TableLevels:
        levels = torch.tensor(LEVELS)
        table = LevelTable.of(levels, _bounds(levels), device)
        lower = (torch.bucketize(table.cell_centres(), levels) - 1).clamp_(0, len(LEVELS) - 2)
        of_cells, low, high = (part.to(device) for part in (lower.float(), levels[lower], levels[lower + 1]))
        return cls(table, of_cells, low, high, SMALLEST_GAP / float(levels.diff().min()))

    @property
    def numbers(self) -> Tensor:
        return self.table.levels

    def nearest(self, values: Tensor) -> Tensor:
        return self.table.nearest(values)

    def around(self, target: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = self.table.cells(target / steps).view(target.shape)
        return cells, self._of_cells(self.low, cells), self._of_cells(self.high, cells)

    def indices(self, found: Tensor) -> Tensor:
        return self._of_cells(self.lower, found)

    @staticmethod
    def _of_cells(entries: Tensor, cells: Tensor) -> Tensor:
        return entries.index_select(0, cells.flatten()).view(cells.shape)


class _IntegerLevels:
    """Those of W6A8."""

    smallest_step = SMALLEST_GAP

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.arange(-LARGEST_LEVEL, LARGEST_LEVEL + 1.0, device=device)

    def nearest(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL)

    def around(self, target: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearly = self.nearest(target / steps)
        is_lower = is_greater(target, _on_grid(nearly * steps))
        low = nearly.add_(is_lower).sub_(1).clamp_(-LARGEST_LEVEL, LARGEST_LEVEL - 1)
        return low, low.clone(), low + 1

    def indices(self, found: Tensor) -> Tensor:
        return found + LARGEST_LEVEL


@dataclass(frozen=True)
class W4a8(RotatedFormat):
    """W4A8; the module describes it.

    Attributes:
        search: choose scales by error
    """

    search: bool = True

    method = "w4a8"
    elements_per_entry = 2
    encoding_inside = W4A8
    #: Whether the search is ours; comfy-kitchen has one for W6A8 itself, which is then always done.
    has_own_search: ClassVar[bool] = True

    @property
    def operand_bits(self) -> int:
        return 8  # levels lie on an INT8 grid

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout(torch.uint8, (out_features, self.packed_columns(in_features))),
            "weight_scale": TensorLayout(torch.float8_e4m3fn, (out_features, in_features // SCALE_GROUP)),
            "weight_scale_2": TensorLayout(torch.float32, (out_features, 1)),
            **self._codebook_layout(),
        }

    def constants(self, fitted: Any) -> dict[str, Tensor]:
        return {"weight_codebook": torch.tensor(LEVELS)}

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        levels = self._levels_on(rows.device)
        rotated = rotate(rows, self.group)
        return quantize_in_tiles(rotated, lambda tile: self._quantize_tile(tile, levels), CACHED_ELEMENTS)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        steps = tensors["weight_scale"].float()
        levels = self._levels_of(tensors).view(len(steps), -1, SCALE_GROUP)
        grid = _on_grid(levels * steps[..., None]).flatten(1)
        return rotate(grid * tensors["weight_scale_2"].float().reshape(-1, 1), self.group)

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return RotatedInt8(self.group).round_inputs(inputs, tensors)

    @staticmethod
    def packed_columns(columns: int) -> int:
        """Bytes of a row."""
        return columns // 2

    def _codebook_layout(self) -> dict[str, TensorLayout]:
        return {"weight_codebook": TensorLayout(torch.float32, (len(LEVELS),), rows_per_entry=0)}

    def _levels_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The level of each element, float32 [rows, in]."""
        return tensors["weight_codebook"].float()[unpack_nibbles(tensors["weight"]).int()]

    def _levels_on(self, device: torch.device) -> _Levels:
        return _TableLevels.on(device)

    def _first_step(self, amax: Tensor) -> Tensor:
        """The step of a group from which fitting starts."""
        return amax

    def _pack(self, indices: Tensor) -> Tensor:
        """Indices of levels, float32 [16, rows, groups], to bytes [rows, bytes]."""
        return _joined(indices, 2)

    def _quantize_tile(self, tile: Tensor, levels: _Levels) -> dict[str, Tensor]:
        values = tile.view(-1, SCALE_GROUP).t().contiguous().view(SCALE_GROUP, len(tile), -1)
        ends = torch.stack([values.amin(dim=0), values.amax(dim=0)])
        step, power = self._fit(values, ends, levels)
        largest = levels.nearest(ends / step).abs_().amax(dim=0)
        row_step = ((largest * step).amax(dim=1, keepdim=True) / GRID_MAX).clamp_(min=SMALLEST_SCALE)
        bits = _e4m3_bits(step / row_step)
        if self.search and self.has_own_search:
            row_step, bits = _search_row_step(row_step, step, power, largest)
        row_steps = row_step.expand_as(step).contiguous()
        target = values.div_(row_steps)
        if self.search or not self.has_own_search:
            tried = (_neighbour(bits, offset) for offset in NEIGHBOURS)
            _, bits = best_attempt((_errors(target, bits, levels), bits) for bits in tried)
        is_beyond = ends.abs_().amax(dim=0) / row_steps >= GRID_MAX
        return {
            "weight": self._pack(_indices(target, bits, is_beyond, levels)),
            "weight_scale": bits.to(torch.uint8).view(torch.float8_e4m3fn),
            "weight_scale_2": row_step,
        }

    def _fit(self, values: Tensor, ends: Tensor, levels: _Levels) -> tuple[Tensor, Tensor]:
        """The step of each group by least squares, and the sum of its levels' squares, both [rows, groups].

        Args:
            values: the rotated weight [16, rows, groups]
            ends: the smallest and the largest number of each group [2, rows, groups]
            levels: of the format
        """
        step = self._first_step(ends.abs().amax(dim=0)).clamp(min=SMALLEST_SCALE)
        for _ in range(ROUNDS):
            nearest = levels.nearest(values / step)
            by_number = _sum_positions(values * nearest)
            power = _sum_positions(nearest.mul_(nearest)).clamp_(min=SMALLEST_SCALE)
            step = (by_number / power).clamp_(min=SMALLEST_SCALE)
        return step, power


@dataclass(frozen=True)
class W6a8(W4a8):
    """W6A8: the levels are the integers from -31 to 31."""

    method = "w6a8"
    elements_per_entry = 1
    column_multiple = 32
    encoding_inside = W6A8
    has_own_search = False

    def constants(self, fitted: Any) -> dict[str, Tensor]:
        return {}

    @staticmethod
    def packed_columns(columns: int) -> int:
        return columns * 3 // 4

    def _codebook_layout(self) -> dict[str, TensorLayout]:
        return {}

    def _levels_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        packed = tensors["weight"]
        half = packed.shape[1] * 2 // 3
        low, high = packed[:, :half], packed[:, half:]
        upper = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
        return (unpack_nibbles(low) | upper << 4).float() - 32

    def _levels_on(self, device: torch.device) -> _Levels:
        return _IntegerLevels(device)

    def _first_step(self, amax: Tensor) -> Tensor:
        return amax / LARGEST_LEVEL

    def _pack(self, indices: Tensor) -> Tensor:
        codes = indices.add_(1)
        high = (codes / 16).floor_()
        return torch.cat([_joined(codes.sub_(high, alpha=16), 2), _joined(high, 4)], dim=1)


def _on_grid(values: Tensor) -> Tensor:
    return values.round_().clamp_(-GRID_MAX, GRID_MAX)


def _joined(codes: Tensor, count: int) -> Tensor:
    """Bytes of so many codes each, the first one lowest: float32 [16, rows, groups] to uint8 [rows, bytes]."""
    joined = codes[::count]
    for place in range(1, count):
        joined = joined.add(codes[place::count], alpha=2 ** (8 // count * place))
    return joined.to(torch.uint8).permute(1, 2, 0).flatten(1)


def _bounds(levels: Tensor) -> Tensor:
    """The largest numbers whose distance to the lower of two levels is not the larger, rounded as in comfy-kitchen.

    Args:
        levels: sorted, float32 [levels]

    Returns:
        float32 [levels - 1]
    """
    low, high = levels[:-1, None], levels[1:, None]
    middles = (low + high) / 2
    around = (middles.view(torch.int32) + torch.arange(-512, 513, dtype=torch.int32)).view(torch.float32)
    is_low = (around - high).abs() >= (around - low).abs()
    return around.where(is_low, -torch.inf).amax(dim=1)


def _sum_positions(products: Tensor) -> Tensor:
    """Sums over the positions, [16, ...] to [...], in the order in which torch adds 16 numbers in a row on a CPU.

    Args:
        products: overwritten
    """
    half = len(products) // 2
    pairs = products[:half].add_(products[half:])
    for pair in pairs[1:]:
        pairs[0].add_(pair)
    return pairs[0]


def _e4m3_bits(steps: Tensor) -> Tensor:
    """The bits of the E4M3 numbers nearest to steps, int16 of the same shape."""
    return steps.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)


def _e4m3_steps(bits: Tensor) -> Tensor:
    """The inverse of `_e4m3_bits`."""
    return bits.to(torch.uint8).view(torch.float8_e4m3fn).float()


def _neighbour(bits: Tensor, offset: int) -> Tensor:
    return (bits + offset).clamp_(SMALLEST_BITS, LARGEST_BITS) if offset else bits


def _around(target: Tensor, steps: Tensor, levels: _Levels) -> tuple[Tensor, Tensor, Tensor]:
    """What `_Levels.around` found, and the distances of both levels on the grid."""
    found, low, high = levels.around(target, steps)
    below, above = (_on_grid(level.mul_(steps)).sub_(target).abs_() for level in (low, high))
    return found, below, above


def _errors(target: Tensor, bits: Tensor, levels: _Levels) -> Tensor:
    """The squared error of each group [rows, groups], in steps of the row's grid.

    Args:
        target: the weight in steps of the row's grid [16, rows, groups]
        bits: E4M3 bits of a step for each group, int16 [rows, groups]
        levels: of the format
    """
    steps = _e4m3_steps(bits)
    _, below, above = _around(target, steps, levels)
    errors = _sum_positions(torch.minimum(below, above, out=below).square_())
    rare = steps < levels.smallest_step
    if bool(rare.any()):
        grid, indices = _searched(target[:, rare], steps[rare], levels)
        errors[rare] = _sum_positions((grid.gather(1, indices).t() - target[:, rare]).square_())
    return errors


def _indices(target: Tensor, bits: Tensor, is_beyond: Tensor, levels: _Levels) -> Tensor:
    """The index of the level for each number, float32 [16, rows, groups]; see `_errors`.

    Args:
        is_beyond: which groups have numbers at the end of the grid or beyond, where several levels meet
    """
    steps = _e4m3_steps(bits)
    found, below, above = _around(target, steps, levels)
    indices = levels.indices(found).add_(is_greater(below, above))
    rare = is_beyond | (steps < levels.smallest_step)
    if bool(rare.any()):
        indices[:, rare] = _searched(target[:, rare], steps[rare], levels)[1].t().float()
    return indices


def _searched(target: Tensor, steps: Tensor, levels: _Levels) -> tuple[Tensor, Tensor]:
    """The levels on the grid [groups, levels], and the index of the nearest for each number, int64 [groups, 16].

    Args:
        target: of some groups, with any steps [16, groups]
        steps: of these groups [groups]
    """
    grid = _on_grid(levels.numbers * steps[:, None])
    return grid, nearest_level(target.t(), grid)


def _search_row_step(row_step: Tensor, step: Tensor, power: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The step of each row's grid [rows, 1], and the bits of each group's step, with the least error expected.

    Args:
        row_step: the one that just holds the row's largest level [rows, 1]
        step: of each group, by least squares [rows, groups]
        power: the sum of the squares of each group's levels [rows, groups]
        largest: the magnitude of each group's largest level [rows, groups]
    """

    def with_factor(factor: float) -> tuple[Tensor, ...]:
        tried = row_step * factor
        bits = _e4m3_bits(step / tried)
        steps = _e4m3_steps(bits) * tried
        of_steps = power * (steps - step).square()
        beyond = (largest * steps - (GRID_MAX + 0.5) * tried).clamp_(min=0).square()
        rounding = SCALE_GROUP / 12 * tried.square()
        return (of_steps + beyond + rounding).sum(dim=1, keepdim=True), tried, bits

    _, row_step, bits = best_attempt(map(with_factor, GRID_FACTORS))
    return row_step, bits
