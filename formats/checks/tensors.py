"""Checks what the tensors of a quantized layer are, before any value is read: presence, dtypes, shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from omni_convert.formats.arithmetic.swizzle import padded_scale_shape
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.dialects.codec import Plain, Swizzled, Transposed
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = ["check_layer"]

HALF = (torch.bfloat16, torch.float16)
AGAIN = "convert the model again"


def check_layer(layer: QuantizedLayer, dialect: str) -> Iterator[Finding]:
    """Everything that is wrong with a layer's tensors but their values."""
    consumer = DIALECTS[dialect].consumers
    reason = layer.format.unsupported(*layer.shape) if isinstance(layer.format, QuantizingFormat) else None
    if reason is not None:
        yield Finding("error", "indivisible-width", layer.stem, reason, consumer, "leave the layer unquantized")
    for suffix, layout in layer.tensors.items():
        if suffix in layer.stored.ones:
            continue
        name = layer.stored.name_of(suffix)
        spec = layer.checkpoint.get(name)
        if spec is None:
            yield Finding(
                "error", "missing-companion", name, f"found none, expected it with {layer.format.label}",
                f"{consumer}: fails to load, or multiplies with whatever the parameter was filled with", AGAIN,
            )  # fmt: skip
            continue
        if layer.stored.spelling.codec(suffix).mismatch(spec, layout) is not None:
            is_cast = spec.dtype is torch.float8_e8m0fnu and DIALECTS[dialect].fills_vllm_omni_parameters
            yield _cast_by_value(spec) if is_cast else _mismatch(layer, suffix, spec, consumer)
            continue
        yield from _tolerated(layer, suffix, spec, dialect)
    for name in layer.stored.unused:
        if name not in layer.checkpoint:
            yield Finding("error", "bad-mark", name, "found no such tensor, expected the layer's mark", consumer, AGAIN)


def _mismatch(layer: QuantizedLayer, suffix: str, spec: TensorSpec, consumer: str) -> Finding:
    """A tensor that cannot be what it should be: by order, by dtype or by shape."""
    codec, layout = layer.stored.spelling.codec(suffix), layer.tensors[suffix]
    stored = codec.stored(layout)
    found, expected = (f"{DTYPE_NAMES[each.dtype]} {list(each.shape)}" for each in (spec, stored))
    what = f"found {found}, expected {expected}"
    is_matrix = len(layout.shape) == 2 and suffix == "weight_scale"
    if is_matrix and isinstance(codec, Swizzled) and spec.shape == layout.shape != stored.shape:
        what += ": this is the linear shape, swizzled scales are due"
        return Finding("error", "scale-order", spec.name, what, consumer, "write it with --dialect for this runtime")
    padded = padded_scale_shape(layout.shape[0], layout.shape[1]) if is_matrix else None
    if padded is not None and spec.shape == padded and spec.shape != stored.shape:
        what += ": this is the shape of swizzled scales, linear ones are due"
        return Finding("error", "scale-order", spec.name, what, consumer, "write it with --dialect for this runtime")
    is_another_size = spec.elements != math.prod(stored.shape)
    check = "wrong-shape" if is_another_size or spec.dtype is stored.dtype else "wrong-dtype"
    return Finding("error", check, spec.name, what, f"{consumer}: refuses it or reads other numbers", AGAIN)


def _cast_by_value(spec: TensorSpec) -> Finding:
    return Finding(
        "error", "silent-cast", spec.name, "found F8_E8M0, expected U8 bytes",
        "vLLM-Omni: copies by value, so that 2^-7 becomes 0: zero output, no error", "store the bytes as U8",
    )  # fmt: skip


def _tolerated(layer: QuantizedLayer, suffix: str, spec: TensorSpec, dialect: str) -> Iterator[Finding]:
    """What we read all the same, and others do not."""
    codec, layout = layer.stored.spelling.codec(suffix), layer.tensors[suffix]
    stored = codec.stored(layout)
    is_f32 = stored.dtype is torch.float32 and not isinstance(codec, Transposed)  # AutoRound's are fp16
    if is_f32 and spec.dtype in HALF:
        yield Finding(
            "warning", "low-precision-scale", spec.name,
            f"found {DTYPE_NAMES[spec.dtype]}, expected F32: up to {'0.4' if spec.dtype is HALF[0] else '0.05'} % off",
            "every runtime: the error is in every weight", "keep scales in F32 when casting a model",
        )  # fmt: skip
    if not DIALECTS[dialect].fills_vllm_omni_parameters or not isinstance(codec, Plain):
        return
    if stored.dtype is torch.uint8 and spec.dtype is torch.float8_e8m0fnu:
        yield _cast_by_value(spec)
    is_scalar = spec.elements == 1 and len(spec.shape) <= 1
    if DIALECTS[dialect].has_exact_shapes and spec.shape != stored.shape and not (is_scalar and not stored.shape):
        yield Finding(
            "error", "wrong-shape", spec.name, f"found {list(spec.shape)}, expected {list(stored.shape)}",
            "vLLM-Omni: refuses other shapes of as many elements", "reshape the tensor",
        )  # fmt: skip
