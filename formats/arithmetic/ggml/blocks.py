"""The simple block types of GGUF: 32 numbers along K in a few bytes; unsearched, as the `gguf` package makes them.

Type    bytes   what is in them                                                       number
Q8_0    34      FP16 scale d; 32 INT8                                                 d * q
Q5_1    24      FP16 scale d, FP16 minimum m; 32 high bits; 16 bytes of low bits      d * q + m
Q5_0    22      FP16 scale d; 32 high bits; 16 bytes of low bits                      d * (q - 16)
Q4_1    20      FP16 scale d, FP16 minimum m; 16 bytes                                d * q + m
Q4_0    18      FP16 scale d; 16 bytes                                                d * (q - 8)
MXFP4   17      E8M0 byte; 16 bytes of E2M1 codes                                     2^(byte - 127) * E2M1

A byte of low bits holds number i in its low half and number i + 16 in its high half; bit i of the high bits is number
i's. Scales are rounded to FP16 after the numbers were divided by them, as upstream does; a search, which Q4_0 to Q5_1
have, divides by what is stored. Types of super-blocks are in `k_quants.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.affine_search import fit_one_affine
from omni_convert.formats.arithmetic.ggml.block_type import BlockType, half_at, half_bytes
from omni_convert.formats.arithmetic.ggml.groups import Groups
from omni_convert.formats.arithmetic.ggml.scaled_search import IntegerValues, fit_one_scale

__all__ = ["BLOCK", "BLOCK_TYPES"]

BLOCK = 32
HALF = BLOCK // 2
# Magnitudes half way between neighbours of E2M1; a number there takes the smaller.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E2M1_SIGN = 8
# A search guesses how far beyond the last code the largest number lies, and repeats the fit of the best guess.
SCALED_STARTS = tuple(0.2 * i for i in range(-5, 6))
AFFINE_STARTS = tuple(0.2 * i for i in range(-5, 6))
REPEATS = 2


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, scale.reciprocal())


def _codes(numbers: Tensor, largest: int) -> Tensor:
    """Numbers without their fraction, as codes; what a denormal scale made infinite is 0."""
    return torch.where(numbers.isfinite(), numbers, 0.0).trunc_().clamp_(0, largest).to(torch.uint8)


def _pack(codes: Tensor) -> Tensor:
    """The low four bits of codes [n, 32] in [n, 16] bytes."""
    low = codes & 0xF
    return low[:, :HALF] | (low[:, HALF:] << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.cat([packed & 0xF, packed >> 4], dim=1)


@dataclass(frozen=True)
class _Q8(BlockType):
    size: int = 34

    def uses_importance(self, *, search: bool) -> bool:
        return False

    def quantize(self, blocks: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
        scale = blocks.abs().amax(dim=1, keepdim=True) / 127
        numbers = blocks * _inverse(scale)
        magnitude = numbers.abs()
        floor = magnitude.floor()
        away = floor + ((magnitude - floor) * 2).floor()  # halves go away from zero
        rounded = torch.where(away.isfinite(), numbers.sign() * away, 0.0)
        return torch.cat([half_bytes(scale), rounded.to(torch.int8).view(torch.uint8)], dim=1)

    def dequantize(self, blocks: Tensor) -> Tensor:
        return blocks[:, 2:].view(torch.int8).float() * half_at(blocks, 0)

    def scale_and_minimum(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        return half_at(blocks, 0), None

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp_(-127, 127)

    def with_elements(self, blocks: Tensor, elements: Tensor) -> Tensor:
        return torch.cat([blocks[:, :2], elements.to(torch.int8).view(torch.uint8)], dim=1)

    def is_finite(self, blocks: Tensor) -> bool:
        return bool(half_at(blocks, 0).isfinite().all())


@dataclass(frozen=True)
class _Integer(BlockType):
    """Q4_0, Q4_1, Q5_0, Q5_1.

    Attributes:
        bits: of a code
        has_minimum: codes count from the smallest number up, not around zero
    """

    bits: int
    has_minimum: bool

    @property
    def size(self) -> int:  # type: ignore[override]  # follows the fields
        return self._codes_at + (BLOCK // 8 if self.bits > 4 else 0) + HALF

    @property
    def _codes_at(self) -> int:
        return 4 if self.has_minimum else 2

    def uses_importance(self, *, search: bool) -> bool:
        return search

    def quantize(self, blocks: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
        codes, head = self._search(blocks, importance) if search else self._nearest(blocks)
        return self._packed(codes, head)

    def _packed(self, codes: Tensor, head: Sequence[Tensor]) -> Tensor:
        """Blocks of codes uint8 [n, 32], and the bytes of scales and minima."""
        high = []
        if self.bits > 4:
            bits = (codes >> 4).view(-1, BLOCK // 8, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
            high.append(bits.sum(dim=2, dtype=torch.uint8))
        return torch.cat([*head, *high, _pack(codes)], dim=1)

    def _search(self, blocks: Tensor, importance: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Codes uint8 [n, 32], and the bytes of scales and minima, with a small squared error."""
        groups, levels = Groups.of_blocks(blocks, importance, BLOCK), 1 << self.bits
        if self.has_minimum:
            scale, minimum, codes = fit_one_affine(groups, levels - 1, AFFINE_STARTS, REPEATS)
            head = [half_bytes(scale[0, :, None]), half_bytes(-minimum[0, :, None])]
        else:
            values = IntegerValues(-levels // 2, levels // 2 - 1)
            scale, codes = fit_one_scale(groups, values, [-(levels // 2 + beyond) for beyond in SCALED_STARTS], REPEATS)
            codes, head = values.codes(codes), [half_bytes(scale[0, :, None])]
        return codes[:, 0].t().to(torch.uint8), head

    def _nearest(self, blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Does the same as `_search`, but bit-equal to the `gguf` package."""
        levels = 1 << self.bits
        if self.has_minimum:
            minimum = blocks.amin(dim=1, keepdim=True)
            scale = (blocks.amax(dim=1, keepdim=True) - minimum) / (levels - 1)
            codes = _codes((blocks - minimum) * _inverse(scale) + 0.5, levels - 1)
            head = [half_bytes(scale), half_bytes(minimum)]
        else:
            largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
            scale = largest / -(levels // 2)  # the largest magnitude takes the one code that has no negative
            codes = _codes(blocks * _inverse(scale) + (levels // 2 + 0.5), levels - 1)
            head = [half_bytes(scale)]
        return codes, head

    def dequantize(self, blocks: Tensor) -> Tensor:
        codes = _unpack(blocks[:, -HALF:])
        if self.bits > 4:
            high = blocks[:, self._codes_at : -HALF, None] >> torch.arange(8, dtype=torch.uint8, device=blocks.device)
            codes |= (high & 1).flatten(1) << 4
        if self.has_minimum:
            return codes.float() * half_at(blocks, 0) + half_at(blocks, 2)
        return (codes.float() - self._zero) * half_at(blocks, 0)

    @property
    def _zero(self) -> int:
        """The code that stands for the element 0."""
        return 0 if self.has_minimum else 1 << self.bits - 1

    def scale_and_minimum(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        return half_at(blocks, 0), -half_at(blocks, 2) if self.has_minimum else None

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp_(-self._zero, (1 << self.bits) - 1 - self._zero)

    def with_elements(self, blocks: Tensor, elements: Tensor) -> Tensor:
        return self._packed((elements + self._zero).to(torch.uint8), [blocks[:, : self._codes_at]])

    def is_finite(self, blocks: Tensor) -> bool:
        return all(bool(half_at(blocks, at).isfinite().all()) for at in range(0, self._codes_at, 2))


@dataclass(frozen=True)
class _Mxfp4(BlockType):
    size: int = 17

    def uses_importance(self, *, search: bool) -> bool:
        return False

    def quantize(self, blocks: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
        amax = blocks.abs().amax(dim=1, keepdim=True)
        # Upstream takes the logarithm in float32, and just below a power of two it is that of the power.
        exponent = amax.double().log2().float().floor() - 2 + 127
        exponent = torch.where(amax > 0, exponent, 0.0).clamp_(min=0)  # upstream wraps around below 2^-125
        return torch.cat([exponent.to(torch.uint8), _pack(_e2m1_codes(blocks / _power(exponent)))], dim=1)

    def dequantize(self, blocks: Tensor) -> Tensor:
        return _e2m1_values(_unpack(blocks[:, 1:])) * _power(blocks[:, :1].float())

    def scale_and_minimum(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        return _power(blocks[:, :1].float()), None

    def nearest(self, values: Tensor) -> Tensor:
        return _e2m1_values(_e2m1_codes(values))

    def with_elements(self, blocks: Tensor, elements: Tensor) -> Tensor:
        return torch.cat([blocks[:, :1], _pack(_e2m1_codes(elements))], dim=1)

    def is_finite(self, blocks: Tensor) -> bool:
        return not bool((blocks[:, 0] == 255).any())


def _e2m1_codes(numbers: Tensor) -> Tensor:
    codes = torch.bucketize(numbers.abs(), torch.tensor(E2M1_MIDDLES, device=numbers.device)).to(torch.uint8)
    return codes | ((numbers < 0) & (codes > 0)).to(torch.uint8) * E2M1_SIGN


def _e2m1_values(codes: Tensor) -> Tensor:
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    return values[codes.int()]


def _power(exponent: Tensor) -> Tensor:
    """2 to the power of E8M0 numbers, float32; the smallest is denormal."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 127).float()


#: What users call a type → how its blocks are made.
BLOCK_TYPES: dict[str, BlockType] = {
    "Q8_0": _Q8(),
    "Q5_1": _Integer(5, has_minimum=True),
    "Q5_0": _Integer(5, has_minimum=False),
    "Q4_1": _Integer(4, has_minimum=True),
    "Q4_0": _Integer(4, has_minimum=False),
    "MXFP4": _Mxfp4(),
}
