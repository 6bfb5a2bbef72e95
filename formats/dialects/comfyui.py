"""How ComfyUI spells quantized layers; files by its community's converters follow it.

Marks:    NAME.comfy_quant, U8, and the same for all layers in the header, which counts where the two differ; see
          `comfyui_marks`. We write both.
Formats:  float8_e4m3fn, float8_e5m2  weight_scale F32 []; input_scale F32 [] if static
          mxfp8             U8 scales in cuBLAS's order, padded
          nvfp4             even element in the high nibble; E4M3 scales in cuBLAS's order, padded; weight_scale_2
          int8_tensorwise   weight_scale F32 [] or [out, 1]; with "convrot": true the weight was rotated
          asym_w4a8_int8    I8 [out, in / 2] or [out, 3 in / 4]; weight_s_rel E4M3 [out, in / 16]; weight_s_channel
                            F32 [out]; with four bits weight_codebook F32 [16]; files without one are not read
          convrot_w4a4      I8 [out, in / 2], the even element in the low nibble; weight_scale F32 [out]
Legacy:   a tensor `scaled_fp8`, whose dtype is that of the weights, and of two elements if the runtime should not
          multiply in FP8; NAME.scale_weight and NAME.scale_input F32 [], the latter absent or 1
Names:    the runtime's; a prefix that all tensors share, such as `model.diffusion_model.`, is dropped
Limits:   weights that ComfyUI would pad (rows or columns that 16, or 32 for mxfp8, does not divide) are not written
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from omni_convert.formats.arithmetic.rotation import LARGEST_GROUP, is_rotation_group
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import (
    Dialect,
    Found,
    JudgedComponent,
    LayerError,
    Spelling,
    StoredLayer,
    WrittenSpelling,
    attempt,
)
from omni_convert.formats.dialects.codec import PLAIN, PaddedRows, Plain, SwappedNibbles, Swizzled
from omni_convert.formats.dialects.comfyui_marks import (
    FULL_PRECISION,
    LEGACY_NAMES,
    MARK,
    METADATA,
    NESTED,
    Mark,
    absent_layer,
    bad_mark,
    has_marks,
    legacy_mark,
    prefix_of,
    read_marks,
)
from omni_convert.formats.dialects.detection import (
    Signature,
    parts_of,
    read_signature,
    stored_layer,
    unknown_format,
)
from omni_convert.formats.dialects.verdict import COMFYUI as RUNTIME
from omni_convert.formats.dialects.verdict import DIFFUSERS, NO_BLOCK, OPENED, Verdict
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.table import family_of_tensors
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.schemes.convrot_w4a4 import CONVROT_W4A4, ConvrotW4A4
from omni_convert.formats.schemes.fp8 import FP8, FP8_E5M2
from omni_convert.formats.schemes.int8 import INT8, RotatedInt8
from omni_convert.formats.schemes.mxfp8 import MXFP8
from omni_convert.formats.schemes.nvfp4 import NVFP4
from omni_convert.formats.schemes.rotated_grid import SCALE_GROUP, W4A8, W6A8, W4a8, W6a8

__all__ = ["COMFYUI"]

NAMES = {"mul_scale": "pre_quant_scale"}
# The format of W4A8 and W6A8, which the width of a row tells apart.
GRID = "asym_w4a8_int8"
# Format in a mark → the method that it stands for.
METHODS = {
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "int8_tensorwise": "int8",
    "convrot_w4a4": "convrot_w4a4",
    GRID: "w4a8",
}
ELEMENTS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# Hardware on which ComfyUI runs a method without dequantizing it.
HARDWARE = {
    "fp8": "a GPU with FP8 (SM 8.9)",
    "int8": "a GPU with INT8 (SM 7.5)",
    "w4a8": "a GPU of SM 8.0",
    "w6a8": "a GPU of SM 8.0",
    "convrot_w4a4": "a GPU with INT4 or INT8 (SM 7.5)",
    "mxfp8": "Blackwell (SM 10.0)",
    "nvfp4": "Blackwell (SM 10.0)",
}
STABLE_DIFFUSION_CPP_METHODS = ("fp8", "int8")
SWIZZLED = ("mxfp8", "nvfp4")
FORMAT_NAMES = {
    FP8: "float8_e4m3fn",
    FP8_E5M2: "float8_e5m2",
    MXFP8: "mxfp8",
    NVFP4: "nvfp4",
    INT8: "int8_tensorwise",
    CONVROT_W4A4: "convrot_w4a4",
    W4A8: GRID,
    W6A8: GRID,
}
GRID_METHODS, CODEBOOK = ("w4a8", "w6a8"), "weight_codebook"
GRID_NAMES = {"weight_scale": "weight_s_rel", "weight_scale_2": "weight_s_channel"}
GRID_CODECS = {"weight": Plain(torch.int8), "weight_scale_2": Plain(shape=(-1,))}
# Canonical are unsigned bytes, and a column of scales.
W4A4_CODECS = {"weight": Plain(torch.int8), "weight_scale": Plain(shape=(-1,))}
# Keys of the header that ComfyUI reads besides: some models are built from `config`. The hash is that of other bytes.
CONFIG, MODEL_SPEC, MODEL_SPEC_HASH = "config", "modelspec.", "modelspec.hash_sha256"
#: Rows and columns are padded to multiples of this.
PADDING = {"mxfp8": 32, "nvfp4": 16}


class ComfyUi(Dialect):
    """See the module."""

    name = "comfyui"
    mixed_methods = ("nvfp4", "fp8")
    consumers = "ComfyUI"
    runtimes = ("comfyui", *Dialect.runtimes)
    usual_verdicts = (
        NO_BLOCK,
        Verdict(DIFFUSERS, "wrong", "no reader of ComfyUI's scales", "omni-convert dequantize gives BF16"),
        OPENED,
    )
    declared_by = "marks"
    is_single_file = True
    names_expected = "original"

    def recognises(self, found: Found) -> bool:
        return has_marks(found)

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        prefix = prefix_of(found)
        for mark in read_marks(found).layers:
            layer = attempt(_marked_layer, found, mark)
            if isinstance(layer, LayerError):
                yield layer
            else:
                yield replace(layer, stem=layer.stem.removeprefix(prefix), place=layer.stem)

    def kept_names(self, found: Found, stored: Collection[str]) -> dict[str, str]:
        mark, prefix = legacy_mark(found), prefix_of(found)
        return {name.removeprefix(prefix): name for name in stored if name != mark}

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        name = _format_name(fmt)
        if name is None:
            return f"ComfyUI has no format for {fmt.label}"
        padding = PADDING.get(name, 1)
        if shape[0] % padding or shape[1] % padding:
            return f"ComfyUI pads {name} to multiples of {padding}, which {shape[0]} x {shape[1]} is not"
        extras = {MARK: json.dumps(_mark_of(fmt)).encode()}
        if fmt.method == ConvrotW4A4.method:
            assert isinstance(fmt, QuantizingFormat), "others have no name"
            return fmt.unsupported(*shape) or WrittenSpelling(codecs=W4A4_CODECS, extras=extras)
        if name == GRID:
            assert isinstance(fmt, QuantizingFormat), "others have no name"
            return fmt.unsupported(*shape) or WrittenSpelling(GRID_NAMES, GRID_CODECS, extras)
        if name not in SWIZZLED:
            return WrittenSpelling(extras=extras)
        nibbles = {"weight": SwappedNibbles()} if name == "nvfp4" else {}
        return WrittenSpelling(codecs={"weight_scale": Swizzled(), **nibbles}, extras=extras)

    def in_full_precision(self, spelling: WrittenSpelling) -> WrittenSpelling | None:
        content = {**json.loads(spelling.extras[MARK]), FULL_PRECISION: True}
        return replace(spelling, extras={MARK: json.dumps(content).encode()})

    def metadata(self, layers: Mapping[str, Format], full_precision: Collection[str] = ()) -> dict[str, str]:
        marks = {
            stem: _mark_of(layers[stem]) | ({FULL_PRECISION: True} if stem in full_precision else {})
            for stem in sorted(layers)
        }
        return {METADATA: json.dumps({"format_version": "1.0", "layers": marks})}

    def kept_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        return {
            key: text
            for key, text in metadata.items()
            if key == CONFIG or (key.startswith(MODEL_SPEC) and key != MODEL_SPEC_HASH)
        }

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        methods, checkpoint = component.methods, component.checkpoint
        family = component.family or (None if checkpoint is None else family_of_tensors(checkpoint))
        needs = ", ".join(f"{method} on {HARDWARE[method]}" for method in sorted(methods & HARDWARE.keys()))
        found = [Verdict(RUNTIME, "loads", f"as it is marked; runs {needs}, else dequantizes"), *self.usual_verdicts]
        flaw = self.names_flaw(family, checkpoint) if family is not None and checkpoint is not None else None
        if flaw is not None:
            found[0] = Verdict(RUNTIME, "refuses", flaw)
        if methods <= {*STABLE_DIFFUSION_CPP_METHODS}:
            why = "in versions that do not drop the scales of scaled FP8 (white images)"
            found.append(Verdict("stable-diffusion.cpp", "loads", why))
        return found

    def is_run_opened(self, formats: Collection[Format]) -> bool:
        return True

    def names_flaw(self, family: Family, names: Iterable[str]) -> str | None:
        if not family.has_names_of_diffusers(names):
            return None
        return (
            f"tensors of {family.name} have diffusers' names, whose quantized layers ComfyUI cannot map to its own; "
            "-m keep --dialect comfyui writes the original names"
        )

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        marks = read_marks(found)
        by_place = {mark.place: mark for mark in marks.layers if isinstance(mark, Mark)}
        for stem, layer in layers.items():
            mark = by_place[layer.place or stem]
            yield from mark.findings(stem)
            yield from _check_legacy_mark(found, stem, layer) if mark.is_legacy else _check_format(stem, layer, mark)
        yield from (absent_layer(stem) for stem in marks.absent)


def _check_format(stem: str, layer: StoredLayer, mark: Mark) -> Iterator[Finding]:
    """The format in a mark against the layer's tensors."""
    declared, dtype = str(mark.format), layer.format.layout(*layer.shape)["weight"].dtype
    is_of_mark = METHODS.get(declared) == layer.format.method
    if declared == GRID:  # whose two widths the tensors tell apart
        is_of_mark = layer.format.method in GRID_METHODS
    if not is_of_mark or ELEMENTS.get(declared, dtype) is not dtype:
        what = f"found {layer.format.label} in {dtype}, but its mark says {declared}".replace("torch.", "")
        yield bad_mark(stem, what, "ComfyUI: noise")


def _check_legacy_mark(found: Found, stem: str, layer: StoredLayer) -> Iterator[Finding]:
    """The legacy mark of a whole file has the dtype of its weights; float32 stands for E4M3."""
    name = legacy_mark(found)
    assert name is not None, "the layer's mark follows from it"
    declared, dtype = found.checkpoint[name].dtype, layer.format.layout(*layer.shape)["weight"].dtype
    if dtype is not (torch.float8_e4m3fn if declared is torch.float32 else declared):
        what = f"found {dtype}, but {name} is {declared}".replace("torch.", "")
        yield bad_mark(stem, what, "ComfyUI: takes codes for those of the other", "convert it again")


def _format_name(fmt: Format) -> str | None:
    """ComfyUI's name of a format, or None; it has none for integers with static activations."""
    if not isinstance(fmt.innermost, QuantizingFormat) or fmt.is_storage or fmt.encoding is None:
        return None
    name = FORMAT_NAMES.get(replace(fmt.encoding, rotation=None))
    return name if fmt.encoding.rotation is None or name in NESTED else None


def _mark_of(fmt: Format) -> dict[str, Any]:
    """The content of the mark of a layer."""
    rotation = None if fmt.encoding is None else fmt.encoding.rotation
    if rotation is None:
        return {"format": _format_name(fmt)}
    turned = {"convrot": True} if fmt.method == "int8" else {}
    grid = {"group_size": SCALE_GROUP} if _format_name(fmt) == GRID else {}
    return {"format": _format_name(fmt), **turned, **grid, "convrot_groupsize": rotation}


def _marked_layer(found: Found, mark: Mark | LayerError) -> StoredLayer:
    """A marked layer, from its mark and its tensors."""
    if isinstance(mark, LayerError):
        raise mark
    place, name = mark.place, mark.format
    if not isinstance(name, str) or name not in METHODS:
        what = f"found ComfyUI's format {str(name)[:40]!r}, expected one of {', '.join(METHODS)}; others are not read"
        raise LayerError(found, place, f"layer '{place}': {what}", "bad-mark")
    parts = parts_of(found, place, LEGACY_NAMES if mark.is_legacy else NAMES)
    if "weight" not in parts:
        what = f"tensor '{place}.weight' is missing, expected with the layer's mark {name}"
        raise LayerError(found, place, what, "missing-companion")
    if name == ConvrotW4A4.method:
        return _w4a4(found, mark, parts)
    if name == GRID:
        return _on_grid(found, mark)
    signature = read_signature(parts, "high" if name == "nvfp4" else "low", swizzled=name in SWIZZLED)
    if signature is None:
        raise unknown_format(found, place, parts)
    try:
        group = mark.rotation()
    except ValueError as error:
        what = f"{error}, expected one meaning; ask who wrote the file, and correct the mark"
        raise LayerError(found, place, f"layer '{place}': {what}", "bad-mark") from None
    if group is not None:
        signature = _rotated(found, place, signature, group)
    layer = stored_layer(place, _without_padding(found, mark, signature), parts)
    return replace(layer, unused=_marks_of(found, place), is_full_precision=mark.is_full_precision)


def _w4a4(found: Found, mark: Mark, parts: Mapping[str, TensorSpec]) -> StoredLayer:
    """A layer of packed integers, whose columns the shape of its weight tells."""
    weight, scale = parts["weight"], parts.get("weight_scale")
    if weight.dtype is not torch.int8 or len(weight.shape) != 2 or scale is None or scale.elements != weight.shape[0]:
        raise unknown_format(found, mark.place, parts)
    shape = (weight.shape[0], 2 * weight.shape[1])
    group = mark.number("convrot_groupsize", LARGEST_GROUP)
    _check_rotation(found, mark.place, group, shape[1])
    places = {suffix: spec.name for suffix, spec in parts.items()}
    layer = StoredLayer(mark.place, ConvrotW4A4(group), shape, Spelling(codecs=W4A4_CODECS), places=places)
    return replace(layer, unused=_marks_of(found, mark.place), is_full_precision=mark.is_full_precision)


def _on_grid(found: Found, mark: Mark) -> StoredLayer:
    """A layer of W4A8 or W6A8."""
    roles = {role: found.get(mark.place, GRID_NAMES.get(role, role)) for role in (*GRID_NAMES, "weight", CODEBOOK)}
    parts = {role: spec for role, spec in roles.items() if spec is not None}
    weight, steps = parts["weight"], parts.get("weight_scale")
    if mark.number("group_size", SCALE_GROUP) != SCALE_GROUP or steps is None or len(steps.shape) != 2:
        raise unknown_format(found, mark.place, parts)
    shape = (weight.shape[0], steps.shape[1] * SCALE_GROUP)
    group = mark.number("convrot_groupsize", LARGEST_GROUP)
    _check_rotation(found, mark.place, group, shape[1])
    fmt = W4a8(group) if CODEBOOK in parts else W6a8(group)
    if parts.keys() != fmt.layout(*shape).keys() or weight.shape[1] != fmt.packed_columns(shape[1]):
        raise unknown_format(found, mark.place, parts)
    layer = StoredLayer(mark.place, fmt, shape, Spelling(GRID_NAMES, GRID_CODECS))
    return replace(layer, unused=_marks_of(found, mark.place), is_full_precision=mark.is_full_precision)


def _marks_of(found: Found, stem: str) -> tuple[str, ...]:
    return (f"{stem}.{MARK}",) if found.get(stem, MARK) is not None else ()


def _check_rotation(found: Found, stem: str, group: Any, columns: int) -> None:
    if type(group) is not int or not is_rotation_group(group, columns):
        what = f"found convrot_groupsize {group!r:.20} for {columns} columns"
        message = f"layer '{stem}': {what}, expected a power of four that divides them"
        raise LayerError(found, stem, message, "bad-mark")


def _without_padding(found: Found, mark: Mark, signature: Signature) -> Signature:
    """The layer without the rows that ComfyUI adds to fill tiles: the bias, or `orig_shape` in the mark, tells them."""
    padding = PADDING.get(str(mark.format), 1)
    rows, columns = signature.shape
    bias, original = found.get(mark.place, "bias"), mark.content.get("orig_shape")
    true = (bias.shape[0] if bias is not None and len(bias.shape) == 1 else rows, columns)
    if isinstance(original, list) and len(original) == 2 and all(type(size) is int for size in original):
        true = (original[0], original[1])
    if true == (rows, columns) or padding == 1:
        return signature
    if true[1] != columns or not 0 < true[0] < rows or -(-true[0] // padding) * padding != rows:
        what = f"found a weight of {rows} x {columns} for a layer of {true[0]} x {true[1]}"
        message = f"layer '{mark.place}': {what}, expected rows padded to a multiple of {padding}, and no columns"
        raise LayerError(found, mark.place, message, "wrong-shape")
    weight = PaddedRows(rows, signature.codecs.get("weight", PLAIN))
    return replace(signature, shape=(true[0], columns), codecs={**signature.codecs, "weight": weight})


def _rotated(found: Found, stem: str, signature: Signature, group: Any) -> Signature:
    _check_rotation(found, stem, group, signature.shape[1])
    if signature.format.encoding != INT8:
        what = f"found {signature.format.label} with convrot, expected int8 without zero points"
        raise LayerError(found, stem, f"layer '{stem}': {what}", "bad-mark")
    return replace(signature, format=RotatedInt8(group))


COMFYUI = ComfyUi()
