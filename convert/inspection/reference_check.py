"""Compares a quantized component with its original weights, and names the mistake that explains a difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.source.component import plain_weights
from omni_convert.formats.checks.scale_order import other_order
from omni_convert.formats.checks.values import SAMPLE_MULTIPLE, other_scale
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.dialects.codec import Swizzled
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.finding import Finding, Severity
from omni_convert.formats.format import Format
from omni_convert.formats.rows import tile_ranges
from omni_convert.formats.views.base import CheckpointView
from omni_convert.formats.views.opened import QuantizedCheckpoint, QuantizedLayer
from omni_convert.formats.views.original_names import under_diffusers_names

__all__ = ["Comparison", "bits_of"]

#: Relative error of a tensor that was only recast.
RECAST_ERROR = 0.01


def bits_of(fmt: Format) -> int:
    """Bits of an element; 8 for GGUF, whose types have several."""
    encoding = fmt.innermost.encoding
    return 8 if encoding is None else encoding.element.bits


class Comparison:
    """A comparison of a component with its original weights, tensor by tensor.

    Attributes:
        errors: layer to relative error, so far
        findings: flaws, so far
    """

    def __init__(self, quantized: QuantizedCheckpoint, reference: Checkpoint, config: Mapping[str, Any]) -> None:
        """Brings the component to the names of diffusers, which the reference has.

        Args:
            config: of the component; {} if there is none

        Raises:
            CheckpointError: the component is not the model of the config.
        """
        assert quantized.dialect is not None
        self.errors: dict[str, float] = {}
        self.findings: list[Finding] = []
        weights = plain_weights(quantized)
        self._weights, _ = under_diffusers_names(weights, config, quantized.dialect)
        self._reference = reference
        self._dialect = DIALECTS[quantized.dialect]
        self._layers = quantized.layers if self._weights is weights else {}
        self._quantized = self._weights.storage.keys() if isinstance(self._weights, CheckpointView) else frozenset()
        self._limit = max((layer.format.largest_error for layer in quantized.layers.values()), default=0.0)
        self._left = dict.fromkeys(self._weights)

    def compare(self, name: str) -> None:
        """Compares a tensor, unless it has another name in diffusers.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if name in self._left:
            del self._left[name]
            self._compare(name)

    def compare_rest(self) -> None:
        """Compares all remaining tensors; raises CheckpointError if a file cannot be read."""
        for name in list(self._left):
            self.compare(name)

    def _compare(self, name: str) -> None:
        spec, other = self._weights[name], self._reference.get(name)
        is_same_shape = other is not None and other.shape == spec.shape
        if name in self._quantized:
            stem = name.removesuffix(WEIGHT)
            if is_same_shape:
                self._compare_layer(stem, name)
                return
            what = f"found {list(other.shape) if other else 'no such weight'} in the reference"
            what += f", expected {list(spec.shape)}"
            self._add("warning", "not-in-reference", stem, what, "", "give the model that it was made from")
        elif is_same_shape:
            self._compare_kept(name)
        elif other is not None and not self._dialect.recasts_kept_tensors:
            what = f"found {list(spec.shape)}, the reference has {list(other.shape)}"
            self._add("error", "differs-from-reference", name, what, "every runtime", "convert the model again")

    def _compare_layer(self, stem: str, name: str) -> None:
        layer = self._layers.get(stem)
        multiple = 1 if layer is None else max(layer.format.row_multiple, layer.stored.spelling.row_multiple)
        limit = self._limit if layer is None else layer.format.largest_error
        error = self.errors[stem] = relative_error(self._tiles(name, multiple))
        if error <= limit:
            return
        if layer is not None:
            self.findings.append(_explained(layer, self._reference, error, limit, self._dialect.consumers))
            return
        what = f"found weights {error:.0%} off the reference, expected at most {limit:.0%}"
        hurts = f"{self._dialect.consumers}: computes with other weights"
        self._add("error", "differs-from-reference", stem, what, hurts, "convert the model again")

    def _compare_kept(self, name: str) -> None:
        """Reports a tensor that is not quantized and differs from the reference by more than a cast."""
        tiles = self._tiles(name)
        if self._dialect.recasts_kept_tensors:
            is_same = relative_error(tiles) <= RECAST_ERROR
        else:
            is_same = all(torch.equal(found, wanted.to(found.dtype)) for found, wanted in tiles)
        if not is_same:
            what = "found other values than in the reference, but it is not quantized"
            self._add("error", "differs-from-reference", name, what, "every runtime", "convert the model again")

    def _tiles(self, name: str, multiple: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields rows of a tensor and the same rows of the reference."""
        shape = self._weights[name].shape
        if not shape:
            yield self._weights.read(name), self._reference.read(name)
            return
        for rows in tile_ranges(shape, multiple):
            yield self._weights.read_rows(name, *rows), self._reference.read_rows(name, *rows)

    def _add(self, severity: Severity, check: str, layer: str, what: str, hurts: str, remedy: str) -> None:
        self.findings.append(Finding(severity, check, layer, what, hurts, remedy))


def relative_error(tiles: Iterable[tuple[Tensor, Tensor]]) -> float:
    """||W - W'|| / ||W|| over the whole weight; NaN counts as infinite.

    Args:
        tiles: rows of W' and the same of W, any float dtype
    """
    difference = total = 0.0
    for found, wanted in tiles:
        weight = wanted.float()
        difference += float((found.float() - weight).square_().sum(dtype=torch.float64))
        total += float(weight.square().sum(dtype=torch.float64))
    ratio = (difference / total) ** 0.5 if total else (0.0 if difference == 0 else float("inf"))
    return ratio if ratio == ratio else float("inf")


def _explained(layer: QuantizedLayer, reference: Checkpoint, error: float, limit: float, consumers: str) -> Finding:
    """The finding about an error, which names a known mistake if that explains it."""
    rows = min(layer.shape[0], SAMPLE_MULTIPLE)
    wanted = reference.read_rows(layer.stored.weight_name, 0, rows).flatten(1).float()
    tensors = layer.read(0, rows)
    for check, suffix, remedy, changed in _mistakes(layer, tensors):
        other = float((layer.format.dequantize(changed) - wanted).norm() / wanted.norm())
        if other <= limit:
            what = f"found weights {error:.0%} off the reference, {other:.1%} once that is undone"
            return Finding("error", check, layer.stored.name_of(suffix), what, f"{consumers}: noise", remedy)
    what = f"found weights {error:.0%} off the reference, expected at most {limit:.0%} for {layer.format.label}"
    if "mul_scale" in layer.tensors and error < 1:  # it minimises the output's error, which may raise the weights'
        remedy = "compare the pictures; calibrated on a few prompts only, record more"
        return Finding("warning", "differs-from-reference", layer.stem, what, "", remedy)
    hurts = f"{consumers}: computes with other weights"
    return Finding("error", "differs-from-reference", layer.stem, what, hurts, "convert the model again")


def _mistakes(
    layer: QuantizedLayer, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, str, dict[str, Tensor]]]:
    """Yields each known mistake: check, suffix, remedy, and the tensors with the mistake undone."""
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
    """Four-bit codes with each pair exchanged, packed or as values; None if the layer has other codes."""
    if bits_of(layer.format) != 4 or layer.shape[1] % 2:
        return None
    if codes.shape[1] != layer.shape[1]:
        return (codes << 4) | (codes >> 4)
    pairs = codes.view(torch.uint8).view(len(codes), -1, 2)
    return pairs.flip(-1).flatten(1).view(codes.dtype)
