"""Compares a quantized component with the weights that it was made of, and tells what was done wrong to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from omni_convert.formats.checks.scale_order import other_order
from omni_convert.formats.checks.values import SAMPLE_MULTIPLE, other_scale
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.codec import Swizzled
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.rows import tile_ranges
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = ["bits_of", "check_against", "check_kept", "relative_error"]

#: Relative error ||W - W'|| / ||W|| that no sound quantization of so many bits reaches.
LIMITS = {8: 0.1, 4: 0.3, 2: 1.0}


def bits_of(fmt: Format) -> int:
    """Bits of an element; 8 for GGUF, whose types have several."""
    encoding = fmt.innermost.encoding
    return 8 if encoding is None else encoding.element.bits


def limit_of(fmt: Format) -> float:
    """Largest relative error that a format explains."""
    return LIMITS[bits_of(fmt)]


def check_against(layer: QuantizedLayer, reference: Checkpoint, dialect: str) -> tuple[float | None, list[Finding]]:
    """The relative error of a layer, None if the reference does not have it, and what is wrong.

    Raises:
        CheckpointError: a file cannot be read.
    """
    name = f"{layer.stem}.weight"
    spec = reference.get(name)
    shape = layer.format.weight_shape(*layer.shape)
    if spec is None or spec.shape != shape:
        found = "no such weight" if spec is None else f"{list(spec.shape)}"
        what = f"found {found} in the reference, expected {list(shape)}"
        return None, [Finding("warning", "not-in-reference", layer.stem, what, "", "give the model it was made of")]
    error = relative_error(layer, reference, name)
    limit = limit_of(layer.format)
    if error <= limit:
        return error, []
    return error, [_explained(layer, reference, error, limit, dialect)]


def relative_error(layer: QuantizedLayer, reference: Checkpoint, name: str) -> float:
    """||W - W'|| / ||W|| over the whole weight; NaN counts as infinite."""
    difference = total = 0.0
    multiple = max(layer.format.row_multiple, layer.stored.spelling.row_multiple)
    for start, stop in tile_ranges(layer.shape, multiple):
        wanted = reference.read_rows(name, start, stop).flatten(1).float()
        difference += float((layer.dequantize(start, stop) - wanted).square_().sum(dtype=torch.float64))
        total += float(wanted.square_().sum(dtype=torch.float64))
    ratio = (difference / total) ** 0.5 if total else (0.0 if difference == 0 else float("inf"))
    return ratio if ratio == ratio else float("inf")


def _explained(layer: QuantizedLayer, reference: Checkpoint, error: float, limit: float, dialect: str) -> Finding:
    """The mistake that explains an error, if one of the known ones does."""
    consumers = DIALECTS[dialect].consumers
    rows = min(layer.shape[0], SAMPLE_MULTIPLE)
    wanted = reference.read_rows(f"{layer.stem}.weight", 0, rows).flatten(1).float()
    tensors = layer.read(0, rows)
    for check, suffix, remedy, changed in _mistakes(layer, tensors):
        other = float((layer.format.dequantize(changed) - wanted).norm() / wanted.norm())
        if other <= limit:
            what = f"found weights {error:.0%} off the reference, {other:.1%} once that is undone"
            return Finding("error", check, layer.stored.name_of(suffix), what, f"{consumers}: noise", remedy)
    what = f"found weights {error:.0%} off the reference, expected at most {limit:.0%} for {layer.format.label}"
    if "mul_scale" in layer.tensors and error < 1:  # chosen for the error of the output, it may raise that of weights
        remedy = "compare the pictures; calibrated on a few prompts only, record more"
        return Finding("warning", "differs-from-reference", layer.stem, what, "", remedy)
    hurts = f"{consumers}: computes with other weights"
    return Finding("error", "differs-from-reference", layer.stem, what, hurts, "convert the model again")


def _mistakes(
    layer: QuantizedLayer, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, str, dict[str, Tensor]]]:
    """Check, suffix, remedy, and the tensors without the mistake."""
    swapped = _swapped(layer, tensors["weight"])
    if swapped is not None:
        yield "nibble-order", "weight", "swap the nibbles of each byte", {**tensors, "weight": swapped}
    scale = tensors.get("weight_scale")
    if scale is not None and scale.dim() == 2 and scale.dtype.itemsize == 1:
        swizzled = isinstance(layer.stored.spelling.codec("weight_scale"), Swizzled)
        other = other_order(scale, swizzled=swizzled)
        if other is not None:
            due = "swizzled" if swizzled else "linear"
            yield "scale-order", "weight_scale", f"store the scales {due}", {**tensors, "weight_scale": other}
    for suffix in ("weight_scale_2", "weight_scale", "weight_scale_inv", "weight_dual_scale", "mul_scale"):
        if suffix in tensors:
            turned = {**tensors, suffix: other_scale(tensors[suffix])}
            yield "reciprocal-scale", suffix, "store one over the scale", turned


def _swapped(layer: QuantizedLayer, codes: Tensor) -> Tensor | None:
    """Four-bit codes with each pair exchanged, packed or as values; None if the layer has others."""
    if bits_of(layer.format) != 4 or layer.shape[1] % 2:
        return None
    if codes.shape[1] != layer.shape[1]:
        return (codes << 4) | (codes >> 4)
    pairs = codes.view(torch.uint8).view(len(codes), -1, 2)
    return pairs.flip(-1).flatten(1).view(codes.dtype)


def check_kept(checkpoint: Checkpoint, stored: str, reference: Checkpoint, name: str) -> Iterator[Finding]:
    """Whether a tensor that is not quantized is what the reference has.

    Args:
        stored: its name in the checkpoint
        name: that in the reference
    """
    spec, other = checkpoint[stored], reference.get(name)
    if other is None or not spec.shape:
        return
    what = ""
    if other.shape != spec.shape:
        what = f"found {list(spec.shape)}, the reference has {list(other.shape)}"
    elif not all(
        torch.equal(checkpoint.read_rows(stored, *rows), reference.read_rows(name, *rows).to(spec.dtype))
        for rows in tile_ranges(spec.shape)
    ):
        what = "found other values than in the reference, but it is not quantized"
    if what:
        yield Finding("error", "differs-from-reference", name, what, "every runtime", "convert the model again")
