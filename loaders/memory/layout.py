"""The layout of weights in memory, where it differs from the layout on disk.

vLLM-Omni wants the E2M1 values of mxfp4 and mxfp4_dualscale in an E4M3 container, a byte each. In memory two codes
share a byte, the even element in the low nibble; a row of odd length ends in a zero code. W4A16 is packed, as in the
file (`packed_int4.py`). Every other tensor stays as it is on disk. A model's `state_dict` shows what is in memory,
because offloading puts tensors back from there; `save_pretrained` of diffusers and transformers asks the quantizer,
which restores the tensors of the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1
from omni_convert.formats.arithmetic.e2m1_container import pack_container, unpack_container
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.loaders.memory.packed_int4 import CODES, CODES_PER_WORD, PackedInt4

__all__ = ["as_loaded", "disk_tensors", "memory_tensors", "weight_shape"]


def as_loaded(fmt: QuantizingFormat) -> QuantizingFormat:
    """The format whose tensors a layer holds in memory: for W4A16 the packed one, otherwise the format itself."""
    if isinstance(fmt, Int4) and not isinstance(fmt, PackedInt4):
        return PackedInt4(fmt.group, fmt.search)
    return fmt


def weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and stored columns of a weight, from the tensors of its layer in memory."""
    if CODES in tensors:
        return tensors[CODES].shape[1], tensors[CODES].shape[0] * CODES_PER_WORD
    rows, columns = tensors["weight"].shape
    return rows, columns


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
