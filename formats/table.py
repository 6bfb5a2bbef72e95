"""The one list of methods, and the format that each gives a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from omni_convert.formats.containers.names import CANONICAL_COMPANIONS
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.fp8_storage import Fp8Storage
from omni_convert.formats.gguf import Gguf
from omni_convert.formats.int4 import Int4
from omni_convert.formats.int8 import Int8
from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.mxfp8 import Mxfp8
from omni_convert.formats.nvfp4 import Nvfp4
from omni_convert.formats.options import FormatOptions

__all__ = ["FORMATS", "LOADABLE", "block_size_of", "build_format", "layer_formats"]


# Rows or columns of a block of FP8, the likely ones first.
BLOCK_SIZES = (128, 64, 32, 16, 256, 512, 1024)

#: Method to the class that holds its facts and builds its format.
FORMATS: dict[str, type[QuantizingFormat]] = {
    kind.method: kind for kind in (Fp8, Int8, Mxfp8, Mxfp4, Mxfp4DualScale, Nvfp4, Fp8Storage, Int4, Gguf)
}

#: Methods that our loader runs. GGUF is for others' kernels.
LOADABLE = tuple(name for name in FORMATS if name != Gguf.method)


def build_format(method: str, **options: Any) -> QuantizingFormat:
    """The format of a method.

    Args:
        options: fields of `FormatOptions`; a format ignores those that mean nothing to it
    """
    return FORMATS[method].build(FormatOptions(**options))


def layer_formats(specs: Mapping[str, TensorSpec], method: str | None = None) -> dict[str, Format]:
    """The format of every quantized layer of a checkpoint, read off the names, dtypes and shapes of its tensors.

    Args:
        method: the one in the config block. It tells apart what tensors alone do not: mxfp8 from mxfp4 without
            smoothing, and fp8 from fp8_storage

    Returns:
        state-dict stem (`layers.0.attention.to_q`) to format, in checkpoint order
    """
    formats: dict[str, Format] = {}
    for name, spec in specs.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight" and (len(spec.shape) == 2 or (method == Fp8Storage.method and len(spec.shape) > 2)):
            suffixes = {
                suffix: specs[f"{stem}.{suffix}"] for suffix in CANONICAL_COMPANIONS if f"{stem}.{suffix}" in specs
            }
            found = _layer_format(spec, suffixes, method)
            if found is not None:
                formats[stem] = found
    return formats


def _layer_format(weight: TensorSpec, companions: Mapping[str, TensorSpec], method: str | None) -> Format | None:
    scale = companions.get("weight_scale")
    static = "input_scale" in companions
    if weight.dtype is torch.uint8 and "weight_scale_2" in companions:
        return Nvfp4(static=static)
    if weight.dtype is torch.int8 and scale is not None:
        return Int8()
    if weight.dtype is not torch.float8_e4m3fn:
        return None
    if "weight_scale_inv" in companions:
        return Fp8Block(block_size_of(weight.shape, companions["weight_scale_inv"].shape))
    if scale is None:
        return None
    if scale.dtype is not torch.uint8 and method == Fp8Storage.method:
        return Fp8Storage().for_weight(weight.shape)
    if scale.dtype is not torch.uint8:
        return Fp8Channel() if 1 < weight.shape[0] == math.prod(scale.shape) else Fp8(static=static)
    smooth = "mul_scale" in companions
    if "weight_dual_scale" in companions:
        return Mxfp4DualScale(smooth=smooth)
    return Mxfp4(smooth=smooth) if smooth or method == "mxfp4" else Mxfp8()


def block_size_of(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, int]:
    """The power of two, from 16 up, that cuts `shape` into `blocks`; 128 where several do."""
    if len(blocks) != 2:
        return BLOCK_SIZES[0], BLOCK_SIZES[0]  # any size will do: the layout will not match
    rows, columns = (
        next((size for size in BLOCK_SIZES if -(-length // size) == count), max(1, length))
        for length, count in zip(shape, blocks, strict=True)
    )
    return rows, columns
