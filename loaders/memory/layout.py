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

from omni_convert.formats.arithmetic.e2m1_container import pack_container, unpack_container
from omni_convert.formats.format import Format
from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale

__all__ = ["CONTAINER_FORMATS", "disk_tensors", "resident_tensors"]

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
