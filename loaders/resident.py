"""How a weight lies in memory, where that is not how it lies on disk.

vLLM-Omni wants the E2M1 values of mxfp4 and mxfp4_dualscale in an E4M3 container, a byte each. In memory two codes
share a byte, the even element in the low nibble; a row of odd length ends in a zero code. Every other tensor stays as
it is on disk. A model's `state_dict` shows what is in memory, because offloading puts tensors back from there;
`save_pretrained` of diffusers and transformers asks the quantizer, which restores the tensors of the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omni_convert.formats.e2m1 import pack_nibbles, unpack_nibbles
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import Format
from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.tiling import quantize_in_tiles

__all__ = ["CONTAINER_FORMATS", "disk_tensors", "pack_container", "resident_tensors", "unpack_container"]

#: Formats whose `weight` is a container on disk and packed in memory.
CONTAINER_FORMATS = (Mxfp4, Mxfp4DualScale)


def resident_tensors(fmt: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer, by suffix, from disk to memory; what is on the meta device has nothing to pack yet."""
    if not isinstance(fmt, CONTAINER_FORMATS):
        return dict(tensors)
    weight = tensors["weight"]
    is_container = weight.dtype is torch.float8_e4m3fn and not weight.is_meta
    return {**tensors, "weight": pack_container(weight) if is_container else weight}


def disk_tensors(fmt: Format, tensors: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
    """Inverse of `resident_tensors`, bit for bit."""
    if not isinstance(fmt, CONTAINER_FORMATS):
        return dict(tensors)
    weight = tensors["weight"]
    is_packed = weight.dtype is torch.uint8
    return {**tensors, "weight": unpack_container(weight, in_features) if is_packed else weight}


def pack_container(weight: Tensor) -> Tensor:
    """E2M1 values in a container, float8_e4m3fn [out, in], to codes, uint8 [out, ceil(in / 2)].

    Raises:
        CheckpointError: some value is not one of E2M1.
    """
    return quantize_in_tiles(weight, _pack_tile)["weight"]


def unpack_container(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of `pack_container`; zeros keep their sign."""

    def unpack_tile(tile: Tensor) -> dict[str, Tensor]:
        return {"weight": _container_bytes(unpack_nibbles(tile)[:, :in_features])}

    return quantize_in_tiles(packed, unpack_tile)["weight"].view(torch.float8_e4m3fn)


def _pack_tile(tile: Tensor) -> dict[str, Tensor]:
    stored = tile.view(torch.uint8)
    magnitude = stored & 0x7F
    # The E4M3 bytes of 1 and up are 0x30 + 4 * code; 0.5 is 0x30 and has code 1.
    index = ((magnitude >> 2).view(torch.int8) - 12).clamp_(min=0).view(torch.uint8)
    codes = index.bitwise_or_(magnitude == 0x30).bitwise_or_((stored >> 4).bitwise_and_(8))
    if not torch.equal(_container_bytes(codes), stored):
        raise CheckpointError("weight: found values that are not of E2M1, expected 0, ±0.5, ±1, ±1.5, ±2, ±3, ±4 or ±6")
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return {"weight": pack_nibbles(codes)}


def _container_bytes(codes: Tensor) -> Tensor:
    """E4M3 bytes of E2M1 codes 0..15, uint8."""
    magnitude = codes & 7
    encoded = (magnitude * 4 + 0x30).mul_(magnitude > 0).sub_((magnitude == 1).to(torch.uint8) * 4)
    return encoded.bitwise_or_((codes & 8) << 4)
