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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import pack_nibbles, unpack_nibbles
from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import PER_ROW, Encoding
from omni_convert.formats.arithmetic.rotation import rotate
from omni_convert.formats.arithmetic.search import best_attempt, nearest_level
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.int8 import RotatedInt8
from omni_convert.formats.schemes.rotated import RotatedFormat

__all__ = ["SCALE_GROUP", "W4A8", "W6A8", "W4a8", "W6a8"]

#: Columns that share a relative step.
SCALE_GROUP = 16
W4A8 = Encoding(IntegerType(4, is_signed=False), torch.float8_e4m3fn, (1, SCALE_GROUP), outer_block=PER_ROW)
W6A8 = replace(W4A8, element=IntegerType(6, is_signed=False))
GRID_MAX = 127
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
GRID_FACTORS = (1.0, 0.9, 0.95, 1.05, 1.12)
# Cells in an interval of length 1, of which a search knows the nearest level.
CELLS = 512


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
    # Steps of E4M3 from the fitted one that are tried without a search, too.
    neighbours: ClassVar[tuple[int, ...]] = (0,)
    is_searched: ClassVar[bool] = True

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
        return quantize_in_tiles(rows, self._quantize_tile)

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

    def _table(self) -> Tensor:
        """The sorted levels."""
        return torch.tensor(LEVELS)

    def _first_scale(self, amax: Tensor) -> Tensor:
        """The step of a group from which fitting starts."""
        return amax

    def _pack(self, indices: Tensor) -> Tensor:
        """Indices into the table, uint8 [rows, in], to bytes."""
        return pack_nibbles(indices)

    def _quantize_tile(self, tile: Tensor) -> dict[str, Tensor]:
        table = self._table().to(tile.device)
        values = rotate(tile, self.group).view(len(tile), -1, SCALE_GROUP)  # [rows, groups, 16]
        step, levels = self._fit(values, table)
        row_step = ((levels * step).abs().amax(dim=(1, 2)) / GRID_MAX).clamp_(min=SMALLEST_SCALE)[:, None, None]
        bits = _e4m3_bits(step / row_step)
        if self.search and self.is_searched:
            row_step, bits = _search(values, step, row_step, table)
        target = values / row_step
        _, bits, indices = best_attempt(_attempt(target, bits, offset, table) for offset in self.neighbours)
        return {
            "weight": self._pack(indices.flatten(1)),
            "weight_scale": bits.view(torch.float8_e4m3fn),
            "weight_scale_2": row_step.view(-1, 1),
        }

    def _fit(self, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Steps [rows, groups, 1] by least squares, and the nearest levels."""
        step = self._first_scale(values.abs().amax(dim=-1, keepdim=True)).clamp_(min=SMALLEST_SCALE)
        levels = table[nearest_level(values / step, table)]
        for _ in range(ROUNDS):
            power = levels.square().sum(-1, keepdim=True).clamp_(min=SMALLEST_SCALE)
            step = ((values * levels).sum(-1, keepdim=True) / power).clamp_(min=SMALLEST_SCALE)
            levels = table[nearest_level(values / step, table)]
        return step, levels


@dataclass(frozen=True)
class W6a8(W4a8):
    """W6A8: the levels are the integers from -31 to 31."""

    method = "w6a8"
    elements_per_entry = 1
    column_multiple = 32
    encoding_inside = W6A8
    neighbours = (0, -1, 1)  # comfy-kitchen's own encoder tries them
    is_searched = False

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

    def _table(self) -> Tensor:
        return torch.arange(-31.0, 32.0)

    def _first_scale(self, amax: Tensor) -> Tensor:
        return amax / 31

    def _pack(self, indices: Tensor) -> Tensor:
        codes = indices + 1
        high = codes >> 4
        upper = high[:, ::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
        return torch.cat([pack_nibbles(codes & 15), upper], dim=1)


def _on_grid(values: Tensor) -> Tensor:
    return values.round_().clamp_(-GRID_MAX, GRID_MAX)


def _e4m3_bits(steps: Tensor) -> Tensor:
    """The bits of the E4M3 numbers nearest to steps [rows, groups, 1], int16 [rows, groups]."""
    return steps.squeeze(-1).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)


def _e4m3_steps(bits: Tensor) -> Tensor:
    """The inverse of `_e4m3_bits`."""
    return bits.to(torch.uint8).view(torch.float8_e4m3fn).float()[..., None]


def _neighbour(bits: Tensor, offset: int) -> Tensor:
    return (bits + offset).clamp_(SMALLEST_BITS, LARGEST_BITS) if offset else bits


def _attempt(target: Tensor, start: Tensor, offset: int, table: Tensor) -> tuple[Tensor, ...]:
    """The error of each group, the E4M3 bits of its step, and the index of each element's level.

    Args:
        target: the weight in steps of the row's grid [rows, groups, 16]
        start: E4M3 bits of a step for each group, int16 [rows, groups]
        offset: E4M3 steps from there
    """
    bits = _neighbour(start, offset)
    grid = _on_grid(table * _e4m3_steps(bits))  # [rows, groups, levels]
    indices = nearest_level(target, grid)
    return grid.gather(2, indices).sub_(target).square_().sum(-1), bits.to(torch.uint8), indices.to(torch.uint8)


def _search(values: Tensor, step: Tensor, row_step: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The step of each row's grid [rows, 1, 1], and the bits of each group's step, with the least error found.

    Args:
        values: the rotated weight [rows, groups, 16]
        step: of each group, by least squares [rows, groups, 1]
        row_step: the one that just holds the row's largest level
    """
    centres = (torch.arange(2 * CELLS, device=values.device) + 0.5) / CELLS - 1
    cells = table[nearest_level(centres, table)]

    def error(row_step: Tensor, bits: Tensor) -> Tensor:
        """Squared error of each group [rows, groups]; levels are chosen before they are rounded to the grid."""
        target, steps = values / row_step, _e4m3_steps(bits)
        numbers = (target * (CELLS / steps)).add_(CELLS).clamp_(0, 2 * CELLS - 1).to(torch.int32).clamp_(min=0)  # NaN
        grid = _on_grid(cells.index_select(0, numbers.flatten()).view(target.shape).mul_(steps))
        return grid.sub_(target).square_().sum(-1)

    def with_factor(factor: float) -> tuple[Tensor, ...]:
        tried = row_step * factor
        bits = _e4m3_bits(step / tried)
        return (error(tried, bits) * tried.square().squeeze(-1)).sum(dim=1), tried, bits

    _, row_step, start = best_attempt(map(with_factor, GRID_FACTORS))
    around = (_neighbour(start, offset) for offset in (0, -1, 1))
    _, bits = best_attempt((error(row_step, bits), bits) for bits in around)
    return row_step, bits
