"""The super-blocks of GGUF: 256 numbers along K in groups of 16 or 32, whose scales are codes themselves.

Type     bytes   fields in their order, and the number of code q in group j
Q2_K     84      scales [16] (low half scale, high half minimum), qs [64], d, dmin: d * s[j] * q - dmin * m[j]
Q3_K     110     hmask [32], qs [64], scales [12], d:                               d * (s[j] - 32) * (q - 4)
Q4_K     144     d, dmin, scales [12], qs [128]:                                    d * s[j] * q - dmin * m[j]
Q5_K     176     d, dmin, scales [12], qh [32], qs [128]:                           d * s[j] * q - dmin * m[j]
Q6_K     210     ql [128], qh [64], scales INT8 [16], d:                            d * s[j] * (q - 32)
IQ4_XS   136     d, scales_h [2], scales_l [4], qs [128]:                           d * (s[j] - 32) * TABLE[q]
IQ4_NL   18      d, qs [16]; a block of 32 with one scale:                          d * TABLE[q]

d and dmin are FP16, and dmin * m is subtracted. The layouts are llama.cpp's, the search for the codes is our own. It
weights squared errors by the importance alone, or equally without one. It rounds every code with the stored scales.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.affine_search import AffineCodes, AffineGrid, Offsets, fit_affine_blocks
from omni_convert.formats.arithmetic.ggml.block_type import BitPlane, BlockType, half_at
from omni_convert.formats.arithmetic.ggml.groups import Groups
from omni_convert.formats.arithmetic.ggml.scaled_search import (
    IntegerValues,
    ScaledCodes,
    TableValues,
    Values,
    fit_one_scale,
    fit_scaled_blocks,
)

__all__ = ["K_QUANTS", "SUPER_BLOCK"]

#: Numbers of a super-block.
SUPER_BLOCK = 256
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The places of bits that several types share.
PAIRS = BitPlane((4, 2, 32), axis=1)  # four bits of Q4_K and Q5_K
QUARTERS = BitPlane((2, 4, 32), axis=1)  # two bits of Q2_K, Q3_K and Q6_K
EIGHTHS = BitPlane((8, 32), axis=0)  # one bit of Q3_K and Q5_K
HALVES = BitPlane((2, 2, 64), axis=1)  # four bits of Q6_K
IQ4_PAIRS = BitPlane((8, 2, 16), axis=1)
IQ4_BLOCK = BitPlane((2, 16), axis=0)
# Offsets of the codes to try. The present code comes first, because the first of equal errors wins.
STAY, ONE, TWO, THREE, FOUR = ((0, *(s * i for i in range(1, n + 1) for s in (-1, 1))) for n in range(5))


def _bytes_of(halves: Tensor) -> Tensor:
    """FP16 values in float32 [n] to bytes [2, n]."""
    return halves.to(torch.float16).view(torch.uint8).view(-1, 2).t()


def _halves_of(rows: Tensor) -> Tensor:
    """The inverse of `_bytes_of`."""
    return rows.t().flatten().view(torch.float16).float()


class _KQuant(BlockType):
    """A type that handles bytes as rows [bytes, n], which hold the same byte of all blocks."""

    numbers = SUPER_BLOCK

    @abstractmethod
    def _halves(self) -> Sequence[int]:
        """Bytes at which FP16 values begin."""

    def is_finite(self, blocks: Tensor) -> bool:
        rows = blocks.t()
        return all(bool(_halves_of(rows[at : at + 2]).isfinite().all()) for at in self._halves())


@dataclass(frozen=True)
class _Affine(_KQuant):
    """Q2_K, Q4_K and Q5_K.

    Attributes:
        size: bytes of a block
        positions: numbers of a group
        grid: codes that can be stored
        starts, rounds: arguments of `fit_affine_blocks`
        fast_starts, fast_rounds: the same without a search
    """

    size: int
    positions: int
    grid: AffineGrid
    starts: Sequence[float]
    rounds: Sequence[Offsets]
    fast_starts: Sequence[float]
    fast_rounds: Sequence[Offsets]

    @abstractmethod
    def _pack(self, stored: AffineCodes) -> Tensor:
        """Bytes [size, n] of what is stored: float32 factors, uint8 scales and minima, codes uint8 [numbers, n]."""

    @abstractmethod
    def _unpack(self, rows: Tensor) -> AffineCodes:
        """The inverse of `_pack`."""

    def quantize(self, blocks: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
        groups = Groups.of_blocks(blocks, importance, self.positions)
        starts, rounds = (self.starts, self.rounds) if search else (self.fast_starts, self.fast_rounds)
        found = fit_affine_blocks(groups, self.grid, starts, rounds)
        stored = AffineCodes(
            found.factor,
            found.minimum_factor,
            found.scales.to(torch.uint8),
            found.minima.to(torch.uint8),
            _in_order(found.codes),
        )
        return self._pack(stored).t().contiguous()

    def dequantize(self, blocks: Tensor) -> Tensor:
        stored = self._unpack(blocks.t().contiguous())
        codes = stored.codes.view(-1, self.positions, len(blocks)).float()
        codes *= (stored.factor * stored.scales.float())[:, None]
        codes -= (stored.minimum_factor * stored.minima.float())[:, None]
        return codes.view(self.numbers, -1).t().contiguous()

    def scale_and_minimum(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        stored = self._unpack(blocks.t().contiguous())
        scale = stored.factor * stored.scales.float()
        minimum = stored.minimum_factor * stored.minima.float()
        return _spread(scale, self.positions), _spread(minimum, self.positions)

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp_(0, self.grid.largest)

    def with_elements(self, blocks: Tensor, elements: Tensor) -> Tensor:
        stored = self._unpack(blocks.t().contiguous())
        return self._pack(replace(stored, codes=elements.to(torch.uint8).t().contiguous())).t().contiguous()


class _Q2K(_Affine):
    def _halves(self) -> Sequence[int]:
        return 80, 82

    def _pack(self, stored: AffineCodes) -> Tensor:
        scales = stored.scales | stored.minima << 4
        halves = [_bytes_of(stored.factor), _bytes_of(stored.minimum_factor)]
        return torch.cat([scales, QUARTERS.pack(stored.codes), *halves])

    def _unpack(self, rows: Tensor) -> AffineCodes:
        codes = QUARTERS.unpack(rows[16:80])
        return AffineCodes(_halves_of(rows[80:82]), _halves_of(rows[82:84]), rows[:16] & 0xF, rows[:16] >> 4, codes)


class _Q45K(_Affine):
    """Q4_K, and Q5_K with a fifth bit of each code in bytes of their own."""

    def _halves(self) -> Sequence[int]:
        return 0, 2

    def _pack(self, stored: AffineCodes) -> Tensor:
        scales, minima = stored.scales, stored.minima
        head = [
            _bytes_of(stored.factor),
            _bytes_of(stored.minimum_factor),
            scales[:4] | scales[4:] >> 4 << 6,
            minima[:4] | minima[4:] >> 4 << 6,
            scales[4:] & 0xF | minima[4:] << 4,
        ]
        if self.grid.largest > 15:
            head.append(EIGHTHS.pack(stored.codes >> 4))
        return torch.cat([*head, PAIRS.pack(stored.codes)])

    def _unpack(self, rows: Tensor) -> AffineCodes:
        first, second, third = rows[4:16].view(3, 4, -1)
        scales = torch.cat([first & 0x3F, third & 0xF | first >> 6 << 4])
        minima = torch.cat([second & 0x3F, third >> 4 | second >> 6 << 4])
        codes = PAIRS.unpack(rows[-128:])
        if self.grid.largest > 15:
            codes |= EIGHTHS.unpack(rows[16:48]) << 4
        return AffineCodes(_halves_of(rows[:2]), _halves_of(rows[2:4]), scales, minima, codes)


@dataclass(frozen=True)
class _Scaled(_KQuant):
    """Q3_K, Q6_K and IQ4_XS.

    Attributes:
        size: bytes of a block
        positions: numbers of a group
        values: values that codes stand for
        lowest_scale: smallest code of a scale
        starts, rounds: arguments of `fit_scaled_blocks`
        fast_starts, fast_rounds: the same without a search
    """

    size: int
    positions: int
    values: Values
    lowest_scale: int
    starts: Sequence[float]
    rounds: Sequence[Sequence[int]]
    fast_starts: Sequence[float]
    fast_rounds: Sequence[Sequence[int]]

    @abstractmethod
    def _pack(self, factor: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        """Bytes [size, n] of a factor [n], scales INT8 [groups, n] and codes uint8 [numbers, n]."""

    @abstractmethod
    def _unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of `_pack`."""

    def quantize(self, blocks: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
        groups = Groups.of_blocks(blocks, importance, self.positions)
        starts, rounds = (self.starts, self.rounds) if search else (self.fast_starts, self.fast_rounds)
        found: ScaledCodes = fit_scaled_blocks(groups, self.values, self.lowest_scale, starts, rounds)
        codes = _in_order(self.values.codes(found.values))
        return self._pack(found.factor, found.scales.to(torch.int8), codes).t().contiguous()

    def dequantize(self, blocks: Tensor) -> Tensor:
        factor, scales, codes = self._unpack(blocks.t().contiguous())
        numbers = self.values.of_codes(codes).view(-1, self.positions, len(blocks))
        numbers *= (factor * scales.float())[:, None]
        return numbers.view(self.numbers, -1).t().contiguous()

    def scale_and_minimum(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        factor, scales, _ = self._unpack(blocks.t().contiguous())
        return _spread(factor * scales.float(), self.positions), None

    def nearest(self, values: Tensor) -> Tensor:
        return self.values.nearest(values, torch.empty_like(values))

    def with_elements(self, blocks: Tensor, elements: Tensor) -> Tensor:
        factor, scales, _ = self._unpack(blocks.t().contiguous())
        codes = self.values.codes(elements.clone()).to(torch.uint8).t().contiguous()
        return self._pack(factor, scales, codes).t().contiguous()


class _Q3K(_Scaled):
    def _halves(self) -> Sequence[int]:
        return (108,)

    def _pack(self, factor: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        six_bits = (scales + 32).view(torch.uint8)
        packed = [BitPlane((2, 8), axis=0).pack(six_bits), BitPlane((4, 4), axis=0).pack(six_bits >> 4)]
        return torch.cat([EIGHTHS.pack(codes >> 2), QUARTERS.pack(codes), *packed, _bytes_of(factor)])

    def _unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        six_bits = BitPlane((2, 8), axis=0).unpack(rows[96:104]) | BitPlane((4, 4), axis=0).unpack(rows[104:108]) << 4
        codes = QUARTERS.unpack(rows[32:96]) | EIGHTHS.unpack(rows[:32]) << 2
        return _halves_of(rows[108:]), six_bits.view(torch.int8) - 32, codes


class _Q6K(_Scaled):
    def _halves(self) -> Sequence[int]:
        return (208,)

    def _pack(self, factor: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        return torch.cat([HALVES.pack(codes), QUARTERS.pack(codes >> 4), scales.view(torch.uint8), _bytes_of(factor)])

    def _unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = HALVES.unpack(rows[:128]) | QUARTERS.unpack(rows[128:192]) << 4
        return _halves_of(rows[208:]), rows[192:208].view(torch.int8), codes


class _IQ4XS(_Scaled):
    def _halves(self) -> Sequence[int]:
        return (0,)

    def _pack(self, factor: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        six_bits = (scales + 32).view(torch.uint8)
        packed = [BitPlane((2, 4), axis=1).pack(six_bits >> 4), BitPlane((4, 2), axis=1).pack(six_bits)]
        return torch.cat([_bytes_of(factor), *packed, IQ4_PAIRS.pack(codes)])

    def _unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        six_bits = BitPlane((4, 2), axis=1).unpack(rows[4:8]) | BitPlane((2, 4), axis=1).unpack(rows[2:4]) << 4
        return _halves_of(rows[:2]), six_bits.view(torch.int8) - 32, IQ4_PAIRS.unpack(rows[8:])


@dataclass(frozen=True)
class _IQ4NL(_KQuant):
    """Blocks of 32 with a scale each.

    Attributes:
        starts, repeats: arguments of `fit_one_scale`
        fast_starts: the guesses without a search
    """

    starts: Sequence[float]
    repeats: int
    fast_starts: Sequence[float]
    values: TableValues

    numbers = 32
    size = 18

    def _halves(self) -> Sequence[int]:
        return (0,)

    def quantize(self, blocks: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
        groups = Groups.of_blocks(blocks, importance, self.numbers)
        starts, repeats = (self.starts, self.repeats) if search else (self.fast_starts, 0)
        scale, values = fit_one_scale(groups, self.values, starts, repeats)
        codes = _in_order(self.values.codes(values))
        return torch.cat([_bytes_of(scale[0]), IQ4_BLOCK.pack(codes)]).t().contiguous()

    def dequantize(self, blocks: Tensor) -> Tensor:
        rows = blocks.t().contiguous()
        return (self.values.of_codes(IQ4_BLOCK.unpack(rows[2:])) * _halves_of(rows[:2])).t().contiguous()

    def scale_and_minimum(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        return half_at(blocks, 0), None

    def nearest(self, values: Tensor) -> Tensor:
        return self.values.nearest(values, torch.empty_like(values))

    def with_elements(self, blocks: Tensor, elements: Tensor) -> Tensor:
        codes = self.values.codes(elements.clone()).to(torch.uint8).t().contiguous()
        return torch.cat([blocks[:, :2], IQ4_BLOCK.pack(codes).t()], dim=1)


def _spread(by_group: Tensor, positions: int) -> Tensor:
    """Numbers of groups [groups, n], repeated for each position of them, [n, numbers]."""
    return by_group.t().repeat_interleave(positions, dim=1)


def _in_order(codes: Tensor) -> Tensor:
    """Codes [positions, groups, n] as uint8 [numbers, n], in the order of the numbers."""
    return codes.to(torch.uint8).transpose(0, 1).reshape(-1, codes.shape[2])


def _beyond(largest: float, beyond: Sequence[float]) -> list[float]:
    return [-(largest + more) for more in beyond]


IQ4_STARTS = (-131.0, -127.0, -123.0, -119.0, 113.0, 109.0)
IQ4_FAST_STARTS = (-127.0, -122.0, -118.0, 113.0)

#: What users call a type → how its blocks are made.
K_QUANTS: dict[str, BlockType] = {
    "Q6_K": _Q6K(
        210,
        16,
        IntegerValues(-32, 31),
        -128,
        starts=_beyond(32, (-5, -4, -3, -2, -1, 0, 1)),
        rounds=(FOUR, FOUR),
        fast_starts=_beyond(32, (-0.6, 0, 0.6)),
        fast_rounds=(STAY,),
    ),
    "Q5_K": _Q45K(
        176,
        32,
        AffineGrid(31, 63),
        starts=(-0.9, -0.6, -0.3, 0, 0.3, 0.6, 0.9),
        rounds=((THREE, TWO), (TWO, TWO)),
        fast_starts=(-0.9, -0.3, 0.3, 0.9),
        fast_rounds=((ONE, ONE),),
    ),
    "Q4_K": _Q45K(
        144,
        32,
        AffineGrid(15, 63),
        starts=(-0.9, -0.6, -0.3, 0, 0.3, 0.6, 0.9),
        rounds=((TWO, TWO), (TWO, TWO)),
        fast_starts=(-0.9, -0.3, 0.3, 0.9),
        fast_rounds=((ONE, ONE),),
    ),
    "Q3_K": _Q3K(
        110,
        16,
        IntegerValues(-4, 3),
        -32,
        starts=_beyond(4, (-0.9, -0.3, 0.3, 0.9)),
        rounds=(TWO,),
        fast_starts=_beyond(4, (0,)),
        fast_rounds=(),
    ),
    "Q2_K": _Q2K(
        84,
        16,
        AffineGrid(3, 15),
        starts=(-0.3, 0, 0.3),
        rounds=((THREE, THREE), (TWO, THREE)),
        fast_starts=(-0.3, 0.3),
        fast_rounds=((ONE, ONE),),
    ),
    "IQ4_XS": _IQ4XS(
        136,
        32,
        TableValues(IQ4_TABLE),
        -32,
        starts=IQ4_STARTS,
        rounds=(TWO, ONE),
        fast_starts=IQ4_FAST_STARTS,
        fast_rounds=(STAY,),
    ),
    "IQ4_NL": _IQ4NL(
        values=TableValues(IQ4_TABLE),
        starts=(-135.0, -131.0, -127.0, -125.0, -123.0, -121.0, -119.0, -117.0, -115.0, 117.0, 113.0, 109.0),
        repeats=1,
        fast_starts=IQ4_FAST_STARTS,
    ),
}
