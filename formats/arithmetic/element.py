"""The types of quantized elements, and rounding float32 numbers to a small float without leaving float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ElementType", "IntegerType"]

EXPONENT_MASK = 0x7F800000


@dataclass(frozen=True)
class IntegerType:
    """An integer of at most 8 bits."""

    bits: int
    is_signed: bool = True

    @property
    def name(self) -> str:
        return f"INT{self.bits}" if self.is_signed else f"UINT{self.bits}"

    @property
    def largest(self) -> float:
        """The largest code."""
        return float((1 << self.bits - self.is_signed) - 1)


@dataclass(frozen=True)
class ElementType:
    """A float of at most 8 bits.

    Attributes:
        name: as in OCP's specifications
        largest: largest finite magnitude; rounding saturates there
        max_exponent: of the binade in which `largest` lies
        min_exponent: of the smallest normal number
        mantissa_bits: not counting the hidden one
        bits: of a code
    """

    name: str
    largest: float
    max_exponent: int
    min_exponent: int
    mantissa_bits: int
    bits: int = 8

    def round(self, values: Tensor, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        """Rounds half to even; what becomes zero loses its sign, NaN stays NaN.

        Five passes over the data and no table: adding and subtracting 1.5 * 2^(23 - mantissa_bits) times the power of
        two below a number makes the adder itself round to the step of that binade.

        Args:
            values: float32, contiguous
            out: where to, float32 of the same shape; may be `values`
            scratch: float32 of the same shape, overwritten; saves an allocation
        """
        rounded = torch.clamp(values, -self.largest, self.largest, out=out)
        if scratch is None:
            scratch = torch.empty_like(rounded)
        torch.bitwise_and(rounded.view(torch.int32), EXPONENT_MASK, out=scratch.view(torch.int32))
        scratch.clamp_(min=2.0**self.min_exponent)
        magic = 1.5 * 2.0 ** (23 - self.mantissa_bits)  # times a power of two: exact, fused into the addition or not
        return rounded.add_(scratch, alpha=magic).sub_(scratch, alpha=magic)

    def round_half_away_(self, values: Tensor) -> Tensor:
        """Rounds in place, half away from zero as msModelSlim does; zeros keep their sign, NaN stays NaN.

        The `+ 0.5` is rounded in float32 as it is there.
        """
        magnitude = values.abs()
        binade = (magnitude.view(torch.int32) & EXPONENT_MASK).view(torch.float32)
        step = binade.clamp_(2.0**self.min_exponent, 2.0**self.max_exponent).mul_(2.0**-self.mantissa_bits)
        magnitude.div_(step).add_(0.5).floor_().mul_(step).clamp_(max=self.largest)
        return torch.copysign(magnitude, values, out=values)
