"""E2M1 values in an E4M3 container, a byte each, to two codes a byte and back; the even element in the low nibble.

Both directions are exact, and many times as fast as through float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omni_convert.formats.e2m1 import unpack_nibbles
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.tiling import quantize_in_tiles

__all__ = ["pack_container", "unpack_container"]

WORD_BYTES = 8
# Bytes that are packed at once: with the words between they stay in cache.
CPU_TILE = 1 << 20
ACCELERATOR_TILE = 1 << 26


def pack_container(weight: Tensor) -> Tensor:
    """E2M1 values in a container, float8_e4m3fn [out, in], to codes, uint8 [out, ceil(in / 2)].

    Raises:
        CheckpointError: some value is not one of E2M1.
    """
    stored = weight.view(torch.uint8)
    rows, columns = stored.shape
    packed = torch.empty(rows, -(-columns // 2), dtype=torch.uint8, device=weight.device)
    step = max(1, (CPU_TILE if weight.device.type == "cpu" else ACCELERATOR_TILE) // max(1, columns))
    for start in range(0, rows, step):
        tile = nn.functional.pad(stored[start : start + step], (0, -columns % WORD_BYTES)).contiguous()
        codes = _codes_of(tile.view(torch.int64))
        # The even element is the low byte of a pair: machines are little-endian. A cast to bytes drops the other one.
        pairs = codes.bitwise_or_(codes >> 4).view(torch.int16)
        packed[start : start + step] = pairs[:, : packed.shape[1]]
    return packed


def unpack_container(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of `pack_container`; zeros keep their sign."""
    pairs_of = _container_pairs(packed.device)

    def unpack_tile(tile: Tensor) -> dict[str, Tensor]:
        pairs = pairs_of.index_select(0, tile.flatten().to(torch.int32))
        return {"weight": pairs.view(torch.uint8).view(len(tile), -1)[:, :in_features]}

    return quantize_in_tiles(packed, unpack_tile)["weight"].contiguous().view(torch.float8_e4m3fn)


def _container_pairs(device: torch.device) -> Tensor:
    """The two E4M3 bytes that each byte of codes stands for, as int16 [256]."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    return _container_bytes(unpack_nibbles(codes)).view(torch.int16).flatten()


def _codes_of(words: Tensor) -> Tensor:
    """Codes of E2M1 values in a container, eight to an int64 word; a byte is sign, b6 ... b0.

    The bytes of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 are 0, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48 and 0x4C: bits 3 and 2 of a
    code are the sign and b6, bit 1 is b3, bit 0 is b2, and b4 without b3. Bits that a shift brings over from the next
    byte are masked away.

    Raises:
        CheckpointError: some value is not one of E2M1.
    """
    halves, doubles = words >> 1, words << 1
    wrong = (words ^ halves).bitwise_and_(_in_each_byte(0x10))  # b5 and b4 differ
    wrong |= halves.bitwise_and_(words).bitwise_and_(_in_each_byte(0x20))  # b6 and b5
    wrong |= words & _in_each_byte(0x03)
    above = (words >> 2).bitwise_and_(_in_each_byte(0x10)).bitwise_or_(words)
    above |= (words >> 3).bitwise_and_(_in_each_byte(0x08))
    wrong |= doubles.bitwise_and_(above.bitwise_not_()).bitwise_and_(_in_each_byte(0x18))  # b3 only, or b2 without b3
    if bool(wrong.any()):
        raise CheckpointError("weight: found values that are not of E2M1, expected 0, ±0.5, ±1, ±1.5, ±2, ±3, ±4 or ±6")
    codes = (words >> 2).bitwise_and_(_in_each_byte(0x03))
    shifted = words >> 4
    codes |= shifted & _in_each_byte(0x0C)
    codes |= shifted.bitwise_and_((words >> 3).bitwise_not_()).bitwise_and_(_in_each_byte(0x01))
    return codes


def _in_each_byte(mask: int) -> int:
    return int.from_bytes(bytes([mask]) * WORD_BYTES, "little", signed=True)


def _container_bytes(codes: Tensor) -> Tensor:
    """E4M3 bytes of E2M1 codes 0..15, uint8."""
    magnitude = codes & 7
    encoded = (magnitude * 4 + 0x30).mul_(magnitude > 0).sub_((magnitude == 1).to(torch.uint8) * 4)
    return encoded.bitwise_or_((codes & 8) << 4)
