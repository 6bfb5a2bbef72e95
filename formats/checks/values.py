"""Checks the values of a quantized layer, tile by tile, with what the file alone tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1, holds_e2m1
from omni_convert.formats.arithmetic.mx import COARSE_BLOCK, MX_BLOCK, split_blocks
from omni_convert.formats.checks.scale_order import other_order, scales_are_scrambled, smoother_order
from omni_convert.formats.dialects.codec import OneForAll, Swizzled
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.rows import tile_ranges
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = [
    "check_finite",
    "check_values",
    "elements_of",
    "has_ordered_scales",
    "order_findings",
    "other_scale",
]

E8M0_NAN = 255
E8M0_ONE = 127
#: What is looked at beyond single values: whole tiles of swizzled scales, this many elements or a little more.
SAMPLE_ELEMENTS = 1 << 22
SAMPLE_MULTIPLE = 128
#: Elements that show the order of block scales.
ORDER_ELEMENTS = 1 << 20
# RMS of weights: trained ones are between 1e-4 and 1; the reciprocal of a scale is off by its square, 1e4 and more.
LARGEST_RMS, SMALLEST_RMS = 100.0, 1e-8
LIKELY_RMS = (1e-5, 10.0)
# Largest input that a static scale clips to.
LARGEST_INPUT, SMALLEST_INPUT = 1e5, 1e-4
# Blocks whose largest element is below a quarter of the grid: a scale chosen for them would be smaller.
UNUSED_SHARE = 0.05
AGAIN = "convert the model again"
# Numbers beside codes that are no scales: of branches, of smoothing, of tables.
LINEAR = ("smooth_factor", "lora_a", "lora_b", "table", "absmax_table", "absmax_offset", "weight_codebook")


def check_values(
    layer: QuantizedLayer, dialect: str, progress: Callable[[int], None] = lambda _: None
) -> list[Finding]:
    """Everything that is wrong with the values of a layer whose tensors are what they should be.

    Args:
        progress: called with numbers of bytes that were looked at

    Raises:
        CheckpointError: a file cannot be read.
    """
    counts: dict[tuple[str, str], int] = {}
    multiple = max(layer.format.row_multiple, layer.stored.spelling.row_multiple)
    for start, stop in tile_ranges(layer.shape, multiple):
        tensors = layer.read(start, stop)
        for suffix, check, count in _bad_values(layer, tensors):
            counts[suffix, check] = max(count, counts.get((suffix, check), 0)) if _is_constant(layer, suffix) else (
                counts.get((suffix, check), 0) + count
            )  # fmt: skip
        progress(layer.nbytes * (stop - start) // max(1, layer.shape[0]))
    findings = [_value_finding(layer, suffix, check, count, dialect) for (suffix, check), count in counts.items()]
    return findings or list(_sample_findings(layer, dialect))


def check_finite(name: str, tiles: Iterator[Tensor]) -> list[Finding]:
    """Whether a tensor that is not quantized has NaN or Inf in it."""
    bad = sum(_bad_numbers(tile) for tile in tiles if tile.is_floating_point())
    if not bad:
        return []
    what = f"found values that are NaN or Inf: {bad}"
    return [Finding("error", "non-finite", name, what, "every runtime: black images", "download or convert it again")]


def _bad_numbers(tile: Tensor) -> int:
    return int((~torch.isfinite(tile.float() if tile.dtype.itemsize == 1 else tile)).sum())


def elements_of(fmt: Format, tensors: Mapping[str, Tensor]) -> Tensor:
    """Decodes the codes without any scale; float32 [rows, in]."""
    return fmt.innermost.multiplied({suffix: _as_one(suffix, tensor) for suffix, tensor in tensors.items()})


def _as_one(suffix: str, tensor: Tensor) -> Tensor:
    if "scale" not in suffix:
        return tensor
    one = torch.full(tensor.shape, E8M0_ONE, dtype=torch.uint8)
    return one if tensor.dtype is torch.uint8 else torch.ones(tensor.shape).to(tensor.dtype)


def other_scale(scale: Tensor) -> Tensor:
    """One over a scale, in its own encoding."""
    return 2 * E8M0_ONE - scale if scale.dtype is torch.uint8 else (1.0 / scale.float()).to(scale.dtype)


def _is_constant(layer: QuantizedLayer, suffix: str) -> bool:
    is_one = isinstance(layer.stored.spelling.codec(suffix), OneForAll)
    return is_one or not layer.tensors[suffix].rows_per_entry


def _bad_values(layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, int]]:
    """Suffix, check and number of impossible values."""
    fmt = layer.format.innermost
    codes = tensors["weight"]
    if fmt.encoding is None and (reason := fmt.flaw(tensors)) is not None:
        yield "weight", "e8m0-nan" if "255" in reason else "non-finite", 1
    if codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        bits = codes.view(torch.uint8) & 0x7F
        first_bad = 0x7F if codes.dtype is torch.float8_e4m3fn else 0x7C
        if bits.numel() and int(bits.max()) >= first_bad:
            yield "weight", "non-finite", int((bits >= first_bad).sum())
        elif fmt.encoding is not None and fmt.encoding.element == E2M1 and not holds_e2m1(codes):
            values = codes.float()
            yield "weight", "off-grid", int((values != E2M1.round(values).copysign(values)).sum())
    for suffix, scale in tensors.items():
        if suffix in LINEAR and (bad := _bad_numbers(scale)):
            yield suffix, "non-finite", bad
        elif suffix == "smooth_factor" and (bad := int((scale <= 0).sum())):
            yield suffix, "non-positive-scale", bad
        if "scale" in suffix and scale.numel():
            yield from ((suffix, check, count) for check, count in _bad_scales(fmt, suffix, scale, tensors))


def _bad_scales(fmt: Format, suffix: str, scale: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    if scale.dtype is torch.uint8:
        if int(scale.max()) == E8M0_NAN:
            yield "e8m0-nan", int((scale == E8M0_NAN).sum())
        return
    numbers = scale.float()
    low, high = torch.aminmax(numbers)
    if bool(low > 0) and bool(torch.isfinite(high)):
        return
    if bad := int((~torch.isfinite(numbers)).sum()):
        yield "non-finite", bad
    # A scale has a sign where integers lean to one side, as AutoRound makes them.
    may_be_negative = fmt.encoding is not None and fmt.encoding.has_zero_point
    negative = 0 if may_be_negative else int((numbers < 0).sum())
    if bad := negative or (_lost(fmt, suffix, tensors) if bool((numbers == 0).any()) else 0):
        yield "non-positive-scale", bad


def _lost(fmt: Format, suffix: str, tensors: Mapping[str, Tensor]) -> int:
    """Number of elements that a scale of 0 erases; in blocks that are all zeros, it does no harm."""
    if suffix in ("mul_scale", "input_scale"):
        return int((tensors[suffix] == 0).sum())
    ones = {name: tensor if name == suffix else _as_one(name, tensor) for name, tensor in tensors.items()}
    return int(((elements_of(fmt, tensors) != 0) & (fmt.multiplied(ones) == 0)).sum())


WORDS = {
    "non-finite": "that are NaN or Inf",
    "off-grid": "that FP4 does not have",
    "e8m0-nan": "of 255, which is NaN",
    "non-positive-scale": "that are not positive, or lost to a scale of 0",
}


def _value_finding(layer: QuantizedLayer, suffix: str, check: str, count: int, dialect: str) -> Finding:
    hurts = f"{DIALECTS[dialect].consumers}: NaN, that is black images" if check in ("non-finite", "e8m0-nan") else (
        f"{DIALECTS[dialect].consumers}: computes with other numbers"
    )  # fmt: skip
    what = f"found values {WORDS[check]}: {count}"
    return Finding("error", check, layer.stored.name_of(suffix), what, hurts, "download the file or convert it again")


def _sample_findings(layer: QuantizedLayer, dialect: str) -> Iterator[Finding]:
    """Reports flaws that only many values together show."""
    tensors = _sample(layer, SAMPLE_ELEMENTS)
    yield from _sizes(layer, tensors, dialect)
    yield from _smoothing(layer, tensors)
    if has_ordered_scales(layer):
        yield from _unused_range(layer, tensors)
        yield from _order(layer, tensors, dialect)
    else:
        yield from _exchanged_groups(layer, tensors, dialect)


def order_findings(layer: QuantizedLayer, dialect: str) -> list[Finding]:
    """Whether the block scales of a layer are in another order than its dialect stores them in.

    Args:
        layer: one that `has_ordered_scales`

    Raises:
        CheckpointError: a file cannot be read.
    """
    return list(_order(layer, _sample(layer, ORDER_ELEMENTS), dialect))


def has_ordered_scales(layer: QuantizedLayer) -> bool:
    """Whether a layer has a scale in a byte for each block, which could be swizzled."""
    block = _block(layer)
    return block is not None and layer.shape[1] >= block


def _block(layer: QuantizedLayer) -> int | None:
    """Columns that share a scale in a byte; None where there is no such scale."""
    encoding = layer.format.innermost.encoding
    # The blocks of a rotated weight have magnitudes so alike that they tell nothing.
    is_told = encoding is not None and encoding.has_byte_scales and encoding.rotation is None
    return encoding.block[1] if encoding is not None and is_told else None


def _sample(layer: QuantizedLayer, elements: int) -> dict[str, Tensor]:
    """The first rows of a layer: whole tiles of swizzled scales."""
    rows, columns = layer.shape
    multiple = SAMPLE_MULTIPLE if len(layer.format.weight_shape(*layer.shape)) == 2 else 1  # experts are matrices each
    most = elements // max(1, columns) // multiple * multiple
    return layer.read(0, min(rows, max(multiple, most)))


def _rms(fmt: Format, tensors: Mapping[str, Tensor]) -> float:
    return float(fmt.innermost.dequantize(tensors).square_().mean().sqrt())


def _sizes(layer: QuantizedLayer, tensors: Mapping[str, Tensor], dialect: str) -> Iterator[Finding]:
    rms = _rms(layer.format, tensors)
    if rms > LARGEST_RMS or 0 < rms < SMALLEST_RMS:
        yield _implausible(layer, tensors, rms, dialect)
    clip = layer.format.innermost.largest_input
    if "input_scale" in tensors and clip is not None:
        largest = float(tensors["input_scale"]) * clip
        if not SMALLEST_INPUT < largest < LARGEST_INPUT:
            likely = "reciprocal-scale" if SMALLEST_INPUT < clip / float(tensors["input_scale"]) < LARGEST_INPUT else (
                "implausible-scale"
            )  # fmt: skip
            what = f"found a scale for inputs up to {largest:.3g}; one over it says {clip * clip / largest:.3g}"
            yield Finding(
                "warning",
                likely,
                layer.stored.name_of("input_scale"),
                what,
                DIALECTS[dialect].consumers,
                "calibrate again",
            )


def _implausible(layer: QuantizedLayer, tensors: Mapping[str, Tensor], rms: float, dialect: str) -> Finding:
    for suffix in ("weight_scale_2", "weight_scale", "weight_scale_inv", "weight_dual_scale"):
        if suffix not in tensors:
            continue
        turned = _rms(layer.format, {**tensors, suffix: other_scale(tensors[suffix])})
        if LIKELY_RMS[0] < turned < LIKELY_RMS[1]:
            what = f"found scales that give weights an RMS of {rms:.3g}; one over them gives {turned:.3g}"
            return Finding(
                "error", "reciprocal-scale", layer.stored.name_of(suffix), what,
                f"{DIALECTS[dialect].consumers}: noise", "store one over the scale",
            )  # fmt: skip
    what = f"found weights with an RMS of {rms:.3g}, expected {LIKELY_RMS[0]:g} to {LIKELY_RMS[1]:g}"
    return Finding("error", "implausible-scale", layer.stem, what, f"{DIALECTS[dialect].consumers}: noise", AGAIN)


def _smoothing(layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    scale = tensors.get("mul_scale")
    if scale is None or "mul_scale" in layer.stored.ones:
        return
    if not scale.to(torch.bfloat16).float().equal(scale.float()):
        yield Finding(
            "warning", "inexact-smoothing", layer.stored.name_of("mul_scale"),
            "found values that bfloat16 does not hold, expected such as it does",
            "vLLM-Omni: casts them, up to 0.4 % off per channel", "round mul_scale before the weight is divided by it",
        )  # fmt: skip


def _counted_blocks(layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The elements of each block, float32 [rows, blocks, block]; and the blocks whose scale was chosen freely."""
    block = _block(layer)
    assert block is not None, "it has ordered scales"
    blocks = split_blocks(elements_of(layer.format, tensors), block)
    smallest_scale = tensors["weight_scale"].view(torch.uint8) <= 2  # nothing smaller could be chosen
    return blocks, (blocks.abs().amax(-1) > 0) & ~smallest_scale


def _unused_range(layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Blocks whose scale is much larger than their elements need."""
    encoding = layer.format.innermost.encoding
    assert encoding is not None, "it has ordered scales"
    blocks, counted = _counted_blocks(layer, tensors)
    top = encoding.element.largest
    unused = float(((blocks.abs().amax(-1) < top / 4) & counted).sum()) / max(1, int(counted.sum()))
    if unused > UNUSED_SHARE:
        what = (
            f"found {unused:.0%} of the blocks below a quarter of the grid's top, {top:g}; a fitting scale is smaller"
        )
        name = layer.stored.name_of("weight_scale")
        yield Finding("warning", "unused-range", name, what, "every runtime: more rounding error than needed", AGAIN)


def _order(layer: QuantizedLayer, tensors: Mapping[str, Tensor], dialect: str) -> Iterator[Finding]:
    """Scales in the other order, or in none."""
    scales, name = tensors["weight_scale"], layer.stored.name_of("weight_scale")
    blocks, counted = _counted_blocks(layer, tensors)
    magnitude = blocks.square().mean(-1).sqrt_().log2_()
    magnitude[~counted] = torch.nan
    coarse = _coarse(tensors, scales.shape)
    swizzled = isinstance(layer.stored.spelling.codec("weight_scale"), Swizzled)
    other = other_order(scales, swizzled=swizzled)
    if other is not None and smoother_order(magnitude + coarse, _log2(scales), _log2(other)):
        found, due = ("linear", "swizzled") if swizzled else ("swizzled", "linear")
        yield Finding(
            "error", "scale-order", name, f"found {found} scales, going by the magnitudes of the blocks, {due} are due",
            f"{DIALECTS[dialect].consumers}: noise", f"store the scales {due}",
        )  # fmt: skip
    elif scales_are_scrambled(magnitude + coarse, _log2(scales)):
        yield _drawn_by_lot(name, dialect)


def _exchanged_groups(layer: QuantizedLayer, tensors: Mapping[str, Tensor], dialect: str) -> Iterator[Finding]:
    """Scales of groups of columns, in more than a byte each, that are in no order, or those of another layer."""
    encoding, scales = layer.format.innermost.encoding, tensors.get("weight_scale")
    if encoding is None or encoding.has_zero_point or encoding.rotation is not None or scales is None:
        return
    rows, columns = encoding.block
    if rows != 1 or columns is None or scales.shape != (len(tensors["weight"]), layer.shape[1] // columns):
        return
    blocks = split_blocks(elements_of(layer.format, tensors), columns)
    magnitude = blocks.square().mean(-1).sqrt_().log2_()
    magnitude[magnitude == -torch.inf] = torch.nan
    if scales_are_scrambled(magnitude, scales.float().log2()):
        yield _drawn_by_lot(layer.stored.name_of("weight_scale"), dialect)


def _drawn_by_lot(name: str, dialect: str) -> Finding:
    what = "found scales that fit their blocks no better than scales drawn by lot"
    return Finding("error", "scale-order", name, what, f"{DIALECTS[dialect].consumers}: noise", AGAIN)


def _log2(scales: Tensor) -> Tensor:
    if scales.dtype is torch.uint8:
        return scales.float() - E8M0_ONE
    return scales.float().clamp(min=2.0**-10).log2()


def _coarse(tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """log2 of the coarse scale above each block's scale; 0 without dual scales."""
    if "weight_dual_scale" not in tensors:
        return torch.zeros(shape)
    above = tensors["weight_dual_scale"].float().squeeze(-1)
    return above.clamp(min=1e-30).log2().repeat_interleave(COARSE_BLOCK // MX_BLOCK, dim=1)[:, : shape[1]]
