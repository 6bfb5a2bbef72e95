"""Checks what the tensors of a quantized layer are, before any value is read: presence, dtypes, shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.dialects.codec import Plain, Transposed
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = ["check_layer"]

HALF = (torch.bfloat16, torch.float16)
AGAIN = "convert the model again"


def check_layer(layer: QuantizedLayer, dialect: str) -> Iterator[Finding]:
    """Reports properties of readable tensors, other than values, with which some readers fail."""
    consumer = DIALECTS[dialect].consumers
    reason = layer.format.unsupported(*layer.shape) if isinstance(layer.format, QuantizingFormat) else None
    if reason is not None:
        yield Finding("error", "indivisible-width", layer.stem, reason, consumer, "leave the layer unquantized")
    for suffix in layer.tensors:
        if suffix in layer.stored.ones:
            continue
        spec = layer.checkpoint.get(layer.stored.name_of(suffix))
        if spec is not None and layer.stored.spelling.codec(suffix).mismatch(spec, layer.tensors[suffix]) is None:
            yield from _tolerated(layer, suffix, spec, dialect)
    for name in layer.stored.unused:
        if name not in layer.checkpoint:
            yield Finding("error", "bad-mark", name, "found no such tensor, expected the layer's mark", consumer, AGAIN)


def _cast_by_value(spec: TensorSpec) -> Finding:
    return Finding(
        "error", "silent-cast", spec.name, "found F8_E8M0, expected U8 bytes",
        "vLLM-Omni: copies by value, so that 2^-7 becomes 0: zero output, no error", "store the bytes as U8",
    )  # fmt: skip


def _tolerated(layer: QuantizedLayer, suffix: str, spec: TensorSpec, dialect: str) -> Iterator[Finding]:
    """Flaws of a tensor that we read all the same, and others do not."""
    codec, layout = layer.stored.spelling.codec(suffix), layer.tensors[suffix]
    stored = codec.stored(layout)
    is_f32 = stored.dtype is torch.float32 and not isinstance(codec, Transposed)  # AutoRound's are fp16
    is_exact = DIALECTS[dialect].has_low_precision_scales or suffix in DIALECTS[dialect].low_precision_parts
    if is_f32 and spec.dtype in HALF and not is_exact:
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
