"""The layout of weights in memory, where it differs from the layout on disk.

vLLM-Omni wants the E2M1 values of mxfp4 and mxfp4_dualscale in an E4M3 container, a byte each. In memory two codes
share a byte, the even element in the low nibble; a row of odd length ends in a zero code. Every other tensor stays as
it is on disk. A model's `state_dict` shows what is in memory, because offloading puts tensors back from there;
`save_pretrained` of diffusers and transformers asks the quantizer, which restores the tensors of the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1
from omni_convert.formats.arithmetic.e2m1_container import pack_container, unpack_container
from omni_convert.formats.format import Format

__all__ = ["disk_tensors", "memory_tensors"]


def _has_e2m1(fmt: Format) -> bool:
    return fmt.encoding is not None and fmt.encoding.element == E2M1


def memory_tensors(fmt: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer as memory holds them, by suffix. On the meta device there is nothing to pack yet."""
    if not _has_e2m1(fmt):
        return dict(tensors)
    weight = tensors["weight"]
    is_container = weight.dtype is torch.float8_e4m3fn and not weight.is_meta
    return {**tensors, "weight": pack_container(weight) if is_container else weight}


def disk_tensors(fmt: Format, tensors: Mapping[str, Tensor], in_features: int) -> dict[str, Tensor]:
    """Inverse of `memory_tensors`, bit for bit."""
    if not _has_e2m1(fmt):
        return dict(tensors)
    weight = tensors["weight"]
    on_disk = fmt.layout(len(weight), in_features)["weight"].dtype
    is_packed = on_disk is torch.float8_e4m3fn and weight.dtype is torch.uint8
    return {**tensors, "weight": unpack_container(weight, in_features) if is_packed else weight}
