"""E2M1 values in an E4M3 container, a byte each, to two codes a byte and back; the even element in the low nibble.

Both directions are exact and look up pairs of values, which is many times as fast as through float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omni_convert.formats.arithmetic.e2m1 import E2M1_VALUES, unpack_nibbles
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.errors import CheckpointError

__all__ = ["pack_container", "unpack_container"]

# Bytes that are packed at once: with the intermediate words they stay in cache.
CPU_TILE = 1 << 20
ACCELERATOR_TILE = 1 << 26
# Stands for a pair in which one value is not E2M1.
NO_CODES = -1


def pack_container(weight: Tensor) -> Tensor:
    """E2M1 values in a container, float8_e4m3fn [out, in], to codes, uint8 [out, ceil(in / 2)].

    Raises:
        CheckpointError: some value is not one of E2M1.
    """
    stored = weight.view(torch.uint8)
    rows, columns = stored.shape
    packed = torch.empty(rows, -(-columns // 2), dtype=torch.uint8, device=weight.device)
    if weight.numel() == 0:
        return packed
    codes_of = _codes_of_pairs(weight.device)
    step = max(1, (CPU_TILE if weight.device.type == "cpu" else ACCELERATOR_TILE) // columns)
    memory = torch.empty(min(step, rows), packed.shape[1], dtype=torch.int32, device=weight.device)
    for start in range(0, rows, step):
        tile = stored[start : start + step]
        if columns % 2:
            tile = nn.functional.pad(tile, (0, 1))
        pairs = memory[: len(tile)].copy_(tile.contiguous().view(torch.int16)).bitwise_and_(0xFFFF)
        codes = codes_of.index_select(0, pairs.view(-1))
        if int(codes.min()) == NO_CODES:
            raise CheckpointError(
                "weight: found values that are not of E2M1, expected 0, ±0.5, ±1, ±1.5, ±2, ±3, ±4 or ±6"
            )
        packed[start : start + step] = codes.view(pairs.shape)
    return packed


def unpack_container(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of `pack_container`; zeros keep their sign."""
    pairs_of = _container_pairs(packed.device)

    def unpack_tile(tile: Tensor) -> dict[str, Tensor]:
        pairs = pairs_of.index_select(0, tile.flatten().to(torch.int32))
        return {"weight": pairs.view(torch.uint8).view(len(tile), -1)[:, :in_features]}

    return quantize_in_tiles(packed, unpack_tile)["weight"].contiguous().view(torch.float8_e4m3fn)


def _container_pairs(device: torch.device) -> Tensor:
    """The two E4M3 bytes that each byte of codes stands for, as int16 [256]; the even one is the low one."""
    values = torch.tensor(E2M1_VALUES).to(torch.float8_e4m3fn).view(torch.uint8)
    pairs = unpack_nibbles(torch.arange(256, dtype=torch.uint8)[:, None])
    return values[pairs.int()].view(torch.int16).flatten().to(device)


def _codes_of_pairs(device: torch.device) -> Tensor:
    """The byte of codes for each two E4M3 bytes, or `NO_CODES`; int16 [65536]."""
    codes = torch.full((1 << 16,), NO_CODES, dtype=torch.int16)
    codes[_container_pairs(codes.device).int() & 0xFFFF] = torch.arange(256, dtype=torch.int16)
    return codes.to(device)
