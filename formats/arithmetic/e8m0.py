"""E8M0, a power of two as one byte, and the rules that choose it for a block.

Byte b in 0..254 stands for 2^(b - 127); 255 is NaN. Files hold it as U8: a consumer that finds F8_E8M0 copies the
*values* into its uint8 parameter.

A rule maps a block's largest magnitude `a` to an exponent E; elements become W / 2^E. For E2M1, whose largest magnitude
is 6 = 1.5 * 2^2:

    floor               floor(log2 a) - 2               OCP MX 1.0, CANN scaleAlg 0; clips blocks with a in (6, 8) * 2^E
    auto_round          as floor, but 1 - 2 for zeros   AutoRound, untuned
    ceil                ceil(log2 a) - 2
    rceil               ceil(log2(a / 6))               cuBLAS, torchao; never clips
    even                floor(log2(a * 8/7)) - 2        up when `a` rounds up in the element's own mantissa
    uos                 ceil(log2(a / 7.25))            the runtime's `mxfp4_scale_alg: 2`; E2M1 only
    msmodelslim         floor(log2(a * 8/7 + 9.6e-7)) - 2     for E4M3 as floor
    msmodelslim_ceil_x  ceil(log2(a / 7.25 + 9.6e-7))         that tool's `ceil_x`; E2M1 only
    mse                 whichever exponent leaves the block the smallest squared error; see `formats/arithmetic/mx.py`

The epsilon of the last two closed forms drowns blocks below 1e-6; they are there for compatibility.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1
from omni_convert.formats.arithmetic.element import ElementType

__all__ = [
    "E8M0_NAN",
    "decode_e8m0",
    "encode_e8m0",
    "exponent_rules",
    "is_msmodelslim",
    "power_of_two",
    "shared_exponent",
    "shared_scale",
]

E8M0_NAN = 255
MAX_EXPONENT = 127
MSMODELSLIM_EPSILON = 9.6e-7


def _float32_mantissa(significand: float) -> int:
    """The 23 mantissa bits of a significand in [1, 2)."""
    return int((significand - 1.0) * 2**23)


def _carry(rule: str, element: ElementType) -> int:
    """The number to add to float32 bits, so that significands that the rule rounds up carry into the exponent."""
    one = 1 << 23
    if rule in ("floor", "auto_round"):
        return 0
    if rule == "ceil":
        return one - 1
    if rule == "rceil":  # up above the largest element
        return one - 1 - _float32_mantissa(element.largest / 2.0**element.max_exponent)
    if rule == "uos":
        return one - 1 - _float32_mantissa(7.25 / 4)
    assert rule == "even", rule
    return one - _float32_mantissa(2 - 2.0 ** -(element.mantissa_bits + 1))


def exponent_rules(element: ElementType) -> tuple[str, ...]:
    """Names of the closed rules that are defined for an element."""
    common = ("floor", "auto_round", "ceil", "rceil", "even", "msmodelslim")
    return (*common, "uos", "msmodelslim_ceil_x") if element == E2M1 else common


def is_msmodelslim(rule: str) -> bool:
    """Whether a rule reproduces msModelSlim, which also rounds ties away from zero."""
    return rule.startswith("msmodelslim")


def shared_exponent(amax: Tensor, rule: str, element: ElementType) -> Tensor:
    """Exponent E of each block by a closed rule.

    Args:
        amax: largest magnitude of each block, any shape; float32, but the msModelSlim rules compute in the dtype given,
            as that tool does in the weight's
        rule: one of `exponent_rules(element)`
        element: type of the elements

    Returns:
        int32, same shape, in -127..127; 128 (byte 255, NaN) where `amax` is not finite
    """
    assert rule in exponent_rules(element), rule
    if is_msmodelslim(rule) and element == E2M1:
        exponent = _msmodelslim_exponent(amax, rule)
    else:
        if rule == "msmodelslim":
            return _msmodelslim_floor(amax, element)
        if rule == "auto_round":
            amax = amax.masked_fill(amax == 0, 2.0)
        # Zero and float32 subnormals have exponent field 0, which ends below -127 for every element and is clamped.
        field = (amax.float().view(torch.int32) + _carry(rule, element)) >> 23
        exponent = field - 127 - element.max_exponent
    exponent = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return exponent.masked_fill(~torch.isfinite(amax), MAX_EXPONENT + 1)


def _msmodelslim_exponent(amax: Tensor, rule: str) -> Tensor:
    if rule == "msmodelslim_ceil_x":
        exponent = torch.ceil(torch.log2(amax / 7.25 + MSMODELSLIM_EPSILON))
    else:
        exponent = torch.floor(torch.log2(amax / 0.875 + MSMODELSLIM_EPSILON)) - 2
    return exponent.nan_to_num(0.0).to(torch.int32)


def _msmodelslim_floor(amax: Tensor, element: ElementType) -> Tensor:
    # In bfloat16 log2 may round up to an integer, which the bits of `amax` would not show.
    exponent = torch.floor(torch.log2(torch.where(amax == 0, 2.0**-126, amax))) - element.max_exponent
    exponent = exponent.float().nan_to_num(MAX_EXPONENT + 1.0)
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT + 1).to(torch.int32)


def shared_scale(amax: Tensor, rule: str, element: ElementType) -> Tensor:
    """2^E for the exponent E of a closed rule, in a third of the steps; for searches.

    Args:
        amax: float32, any shape; blocks below 2^-100 are taken for 2^-100
        rule: one without an epsilon
        element: type of the elements
    """
    bits = amax.clamp(min=2.0**-100).view(torch.int32).add_(_carry(rule, element)).bitwise_and_(0x7F800000)
    return bits.view(torch.float32).mul_(2.0**-element.max_exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^E as float32, exactly; int32 E in -127..127 of any shape, 128 gives NaN."""
    field = exponent + 127
    bits = torch.where(field > 0, field << 23, 1 << 22)  # 2^-127 is subnormal in float32
    return torch.where(field > 254, 0x7FC00000, bits).view(torch.float32)


def encode_e8m0(exponent: Tensor) -> Tensor:
    """int32 exponents -127..128 to bytes, uint8."""
    return (exponent + 127).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """Bytes (uint8 or float8_e8m0fnu) to float32 multipliers; 255 gives NaN."""
    return power_of_two(codes.view(torch.uint8).to(torch.int32) - 127)
