"""E2M1, the 4-bit float: 2 exponent bits with bias 1, 1 mantissa bit, magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.

A code is `sign << 3 | index of the magnitude`; code 8 is -0. On disk either two codes share a byte, in one of two
nibble orders, or each *value* (not code) lies in an E4M3 container, which holds every E2M1 value exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.element import ElementType

__all__ = [
    "E2M1",
    "E2M1_VALUES",
    "NibbleOrder",
    "decode_packed",
    "encode_e2m1",
    "grid_flaw",
    "holds_e2m1",
    "pack_nibbles",
    "round_to_e2m1",
    "unpack_nibbles",
]

E2M1 = ElementType("E2M1", 6.0, max_exponent=2, min_exponent=0, mantissa_bits=1, bits=4)
#: Value of each code 0..15.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# The E4M3 bytes of these values.
_E2M1_IN_E4M3 = torch.tensor(E2M1_VALUES).to(torch.float8_e4m3fn).view(torch.uint8).tolist()

#: Which nibble of a byte holds the even element: `low` for ModelOpt, msModelSlim and AutoRound, `high` for ComfyUI.
NibbleOrder = Literal["low", "high"]


def round_to_e2m1(values: Tensor, half_away: bool = False) -> Tensor:
    """float32 to the nearest E2M1 value, kept in float32; saturates at ±6, NaN stays NaN.

    Args:
        values: float32, any shape
        half_away: ties away from zero, as msModelSlim rounds, instead of to even, as hardware does
    """
    if half_away:
        return E2M1.round_half_away_(values.clone())
    rounded = E2M1.round(values)
    return torch.copysign(rounded, values, out=rounded)


def encode_e2m1(values: Tensor) -> Tensor:
    """Codes 0..15 of float32 numbers that are E2M1 values; uint8, same shape."""
    # Twice a magnitude is 0, 1, 2, 3, 4, 6, 8 or 12, quick to count in bytes; -0 has its sign in the bits only.
    doubled = (values * 2).to(torch.int8).abs_().view(torch.uint8)
    index = torch.minimum(doubled, (doubled >> 1).add_(2)).clamp_(max=7)
    return index.bitwise_or_((values.view(torch.int32) >> 28).to(torch.uint8).bitwise_and_(8))


def decode_packed(packed: Tensor, even: NibbleOrder = "low") -> Tensor:
    """Values of two codes a byte, float32.

    Args:
        packed: uint8 [..., K / 2]
        even: the nibble that holds the elements with even index

    Returns:
        float32 [..., K]
    """
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    low, high = values.repeat(16), values.repeat_interleave(16)
    pairs = torch.stack((low, high) if even == "low" else (high, low), dim=-1)  # both values of each byte
    # One look-up of 8 bytes, instead of two and the work of taking nibbles apart: ten times as fast.
    chosen = pairs.view(torch.int64).flatten().index_select(0, packed.flatten().to(torch.int32))
    return chosen.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])


def grid_flaw(tensors: Mapping[str, Tensor]) -> str | None:
    """The reason why a weight is not E2M1 values in an E4M3 container, or None."""
    if "weight" not in tensors or holds_e2m1(tensors["weight"]):
        return None
    return "weight: found E4M3 bytes off the E2M1 grid, expected 0, ±0.5, 1, 1.5, 2, 3, 4 or 6"


def holds_e2m1(container: Tensor) -> bool:
    """Whether all elements of a float8_e4m3fn tensor are E2M1 values."""
    counts = torch.bincount(container.view(torch.uint8).flatten(), minlength=256)
    return int(counts[_E2M1_IN_E4M3].sum()) == container.numel()


def pack_nibbles(codes: Tensor, even: NibbleOrder = "low") -> Tensor:
    """Two codes a byte.

    Args:
        codes: uint8 0..15 [..., K], K even
        even: the nibble that holds the elements with even index

    Returns:
        uint8 [..., K / 2]
    """
    pairs = codes.contiguous().view(torch.int16)  # the even element is the low byte: machines are little-endian
    return (pairs | (pairs >> 4) if even == "low" else (pairs << 4) | (pairs >> 8)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, even: NibbleOrder = "low") -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., K / 2] to uint8 codes [..., K]."""
    low, high = packed & 0xF, packed >> 4
    return torch.stack((low, high) if even == "low" else (high, low), dim=-1).flatten(-2)
