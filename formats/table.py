"""The one list of methods: what a user asks for, and the format that it gives a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import Fp8, Fp8Block
from omni_convert.formats.int8 import Int8
from omni_convert.formats.tensor_spec import TensorSpec

__all__ = ["FORMATS", "FormatOptions", "Method", "layer_formats"]


@dataclass(frozen=True)
class FormatOptions:
    """Choices of a recipe (or of a checkpoint's config block) that a format can honour; it ignores the others."""

    static: bool = False
    input_scale_rule: str = "max"
    weight_block_size: tuple[int, int] | None = None
    shared_in_group: bool = False


@dataclass(frozen=True)
class Method:
    """A method: how it builds a format, and what it can do with calibration."""

    build: Callable[[FormatOptions], Format]
    has_static_activations: bool
    summary: str


def _build_fp8(options: FormatOptions) -> Format:
    if options.weight_block_size is not None:
        return Fp8Block(options.weight_block_size)
    return Fp8(options.static, options.input_scale_rule)


FORMATS: dict[str, Method] = {
    "fp8": Method(_build_fp8, has_static_activations=True, summary="8-bit floats, one scale per weight or block"),
    "int8": Method(
        lambda options: Int8(options.shared_in_group), has_static_activations=False, summary="8-bit integers per row"
    ),
}


def layer_formats(specs: Mapping[str, TensorSpec]) -> dict[str, Format]:
    """The format of every quantized layer of a checkpoint, read off the names, dtypes and shapes of its tensors.

    Returns:
        state-dict stem (`layers.0.attention.to_q`) to format, in checkpoint order
    """
    formats: dict[str, Format] = {}
    for name, spec in specs.items():
        stem, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(spec.shape) != 2:
            continue
        if spec.dtype is torch.int8 and f"{stem}.weight_scale" in specs:
            formats[stem] = Int8()
        elif spec.dtype is torch.float8_e4m3fn and f"{stem}.weight_scale_inv" in specs:
            blocks = specs[f"{stem}.weight_scale_inv"].shape
            formats[stem] = Fp8Block(_block_size(spec.shape, blocks))
        elif spec.dtype is torch.float8_e4m3fn and f"{stem}.weight_scale" in specs:
            formats[stem] = Fp8(static=f"{stem}.input_scale" in specs)
    return formats


def _block_size(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, int]:
    """The power of two, from 16 up, that cuts `shape` into `blocks`; 128 where several do."""
    rows, columns = (
        next((size for size in (128, 64, 32, 16, 256, 512, 1024) if -(-length // size) == count), length)
        for length, count in zip(shape, blocks, strict=True)
    )
    return rows, columns
