"""E4M3 and E5M2, the 8-bit floats, as torch stores them.

E4M3 (`float8_e4m3fn`): 4 exponent bits with bias 7, 3 mantissa bits, largest 448, smallest 2^-9, no infinity.
E5M2 (`float8_e5m2`): 5 exponent bits with bias 15, 2 mantissa bits, largest 57344, smallest 2^-16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.element import ElementType
from omni_convert.formats.arithmetic.scratch import Scratch

__all__ = ["E4M3", "E4M3_MAX", "E5M2", "E5M2_MAX", "round_e4m3_", "round_to_e4m3", "round_to_e5m2"]

E4M3 = ElementType("E4M3", 448.0, max_exponent=8, min_exponent=-6, mantissa_bits=3)
E5M2 = ElementType("E5M2", 57344.0, max_exponent=15, min_exponent=-14, mantissa_bits=2)
E4M3_MAX = E4M3.largest
E5M2_MAX = E5M2.largest

_SCRATCH = Scratch()


def round_e4m3_(values: Tensor) -> Tensor:
    """Rounds float32 numbers to E4M3 in place, which a CPU does faster than it makes codes."""
    scratch = _SCRATCH.take(values.numel(), values.dtype, values.device).view(values.shape)
    return E4M3.round(values, out=values, scratch=scratch)


def round_to_e4m3(values: Tensor, half_away: bool = False) -> Tensor:
    """float32 to E4M3, half to even, saturating; NaN stays NaN.

    The clamp is explicit: not every torch release saturates in the cast.

    Args:
        values: float32, any shape
        half_away: ties away from zero, as msModelSlim rounds, instead of to even as hardware does
    """
    rounded = E4M3.round_half_away_(values.clone()) if half_away else values.clamp(-E4M3_MAX, E4M3_MAX)
    return rounded.to(torch.float8_e4m3fn)


def round_to_e5m2(values: Tensor, half_away: bool = False) -> Tensor:
    """float32 to E5M2, half to even, saturating (infinities too); NaN stays NaN. Same arguments as `round_to_e4m3`."""
    rounded = E5M2.round_half_away_(values.clone()) if half_away else values.clamp(-E5M2_MAX, E5M2_MAX)
    return rounded.to(torch.float8_e5m2)
