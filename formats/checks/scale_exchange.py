"""Whether layers have each other's scales, told from the file alone.

Within a weight, a block whose largest element is an outlier has a large scale and small other elements. So scales and
the magnitudes of elements vary against each other, block by block, in a pattern that no other layer has: a layer whose
elements another layer's scales fit better than its own, while its own fit elsewhere too, has that layer's. Where a
weight has one scale, or all its scales are alike, there is no pattern, and only a reference tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.checks.scale_order import LEAST_SPREAD, WIDEST
from omni_convert.formats.checks.values import elements_of
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = ["ScaleTrace", "exchanged_scales", "trace_of"]

# Blocks of a layer that are looked at. With fewer than the least, chance could decide among hundreds of layers.
MIN_BLOCKS, MAX_BLOCKS = 1024, 8192
MAX_ELEMENTS = 1 << 22
# How much smoother the other layer's scales must make the weight. Own scales of trained weights make it twice as smooth
# as others do; those of weights drawn evenly, by 7 %.
MARGIN = 0.15
MAX_ZEROS = 0.1


@dataclass(frozen=True)
class ScaleTrace:
    """Scales and elements of a layer's first blocks, with the means of rows and columns subtracted.

    Attributes:
        elements: log2 RMS of each block's elements, float32 [blocks]
        scales: log2 of its scale, all levels together, float32 [blocks]
        shape: rows and columns of these blocks; those of other shapes have other scales
    """

    layer: QuantizedLayer
    elements: Tensor
    scales: Tensor
    shape: tuple[int, int]


def trace_of(layer: QuantizedLayer) -> ScaleTrace | None:
    """Reads the first rows of a layer; None if its scales show no pattern.

    Raises:
        CheckpointError: a file cannot be read.
    """
    fmt = layer.format.innermost
    rows, columns = layer.shape
    width = _width(fmt, columns)
    if width is None or columns % width:
        return None
    per_row = columns // width
    multiple = max(fmt.row_multiple, layer.stored.spelling.row_multiple)
    wanted = min(-(-MAX_BLOCKS // per_row), MAX_ELEMENTS // columns)
    stop = min(rows, -(-wanted // multiple) * multiple)
    if stop * per_row < MIN_BLOCKS:
        return None
    tensors = layer.read(0, stop)
    elements, weight = (_magnitudes(each, width) for each in (elements_of(fmt, tensors), fmt.multiplied(tensors)))
    known = (elements > -torch.inf) & (weight > -torch.inf)
    scales = weight - elements
    if float((~known).float().mean()) > MAX_ZEROS or float(scales[known].std()) < LEAST_SPREAD:
        return None
    shape = (elements.shape[0], elements.shape[1])
    return ScaleTrace(layer, _centred(elements, known), _centred(scales, known), shape)


def _width(fmt: Format, columns: int) -> int | None:
    """Columns that share a scale; None where it serves more than a row, or codes are of blocks of a rotated weight."""
    encoding = fmt.encoding
    rows, width = encoding.block if encoding is not None else (None, None)
    is_turned = encoding is not None and encoding.rotation is not None and width is not None
    return None if rows != 1 or is_turned else width or columns


def _magnitudes(values: Tensor, width: int) -> Tensor:
    return values.view(len(values), -1, width).square().mean(-1).sqrt_().log2_()


def _centred(numbers: Tensor, known: Tensor) -> Tensor:
    """Subtracts the means of rows and columns where there are several; zero where nothing is known."""
    middle = float(numbers[known].median())
    rest = torch.where(known, numbers.clamp(middle - WIDEST, middle + WIDEST), torch.nan)
    for dimension in (0, 1):
        if rest.shape[dimension] > 1:
            rest = rest - rest.nanmean(dimension, keepdim=True)
    return rest.nan_to_num_(0.0).flatten()


def exchanged_scales(traces: Sequence[ScaleTrace], dialect: str) -> Iterator[Finding]:
    """Every layer that has another layer's scales."""
    for shape in dict.fromkeys(trace.shape for trace in traces):
        alike = [trace for trace in traces if trace.shape == shape]
        for own, other in _better_fits(alike):
            yield Finding(
                "warning", "exchanged-scales", own.layer.stored.name_of("weight_scale"),
                f"found scales that fit these codes worse than those of '{other.layer.stem}' do, which fit no better "
                "where they are", f"{DIALECTS[dialect].consumers}: noise", "exchange them, or convert the model again",
            )  # fmt: skip


def _better_fits(traces: Sequence[ScaleTrace]) -> Iterator[tuple[ScaleTrace, ScaleTrace]]:
    """Layers and the layers that have their scales: the variance of log2(elements * scales) is least with these."""
    elements, scales = (torch.stack([getattr(trace, name) for trace in traces]) for name in ("elements", "scales"))
    squares = elements.square().sum(1)[:, None] + scales.square().sum(1)[None, :]
    roughness = squares + 2 * elements @ scales.T  # [elements of a layer, scales of a layer]
    best = roughness.argmin(1)
    is_better = roughness.amin(1) < (1 - MARGIN) * roughness.diagonal()
    # Scales belong to one layer: those that fit several better were rounded least, as nested ones may be.
    is_one = best[is_better].bincount(minlength=len(best)) == 1
    for own in is_better.nonzero().flatten().tolist():
        other = int(best[own])
        if is_one[other] and best[other] != other:
            yield traces[own], traces[other]
