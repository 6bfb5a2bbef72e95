"""How ComfyUI spells quantized layers; files by its community's converters follow it.

Marks:    NAME.comfy_quant, U8: the JSON {"format": ...}; or the same for all layers in the header, under
          `_quantization_metadata`: {"format_version": "1.0", "layers": {NAME: {"format": ...}}}. We write both.
Formats:  float8_e4m3fn, float8_e5m2  weight_scale F32 []; input_scale F32 [] if static
          mxfp8             U8 scales in cuBLAS's order, padded
          nvfp4             even element in the high nibble; E4M3 scales in cuBLAS's order, padded; weight_scale_2
          int8_tensorwise   weight_scale F32 [] or [out, 1]; with "convrot": true the weight was rotated
Legacy:   a tensor `scaled_fp8`, whose dtype is that of the weights, and of two elements if the runtime should not
          multiply in FP8; NAME.scale_weight and NAME.scale_input F32 [], the latter absent or 1
Names:    the runtime's; a prefix that all tensors share, such as `model.diffusion_model.`, is dropped
Limits:   weights that ComfyUI would pad (rows or columns that 16, or 32 for mxfp8, does not divide) are not written
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.json_file import parse_json
from omni_convert.formats.dialects.base import Dialect, Found, LayerError, StoredLayer, WrittenSpelling, attempt
from omni_convert.formats.dialects.codec import SwappedNibbles, Swizzled
from omni_convert.formats.dialects.detection import (
    Signature,
    parts_of,
    read_signature,
    stored_layer,
    unknown_format,
)
from omni_convert.formats.dialects.verdict import COMFYUI as RUNTIME
from omni_convert.formats.dialects.verdict import CONVERT_FIRST, DIFFUSERS, NO_BLOCK, Verdict
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.family import Family
from omni_convert.formats.finding import Finding
from omni_convert.formats.foreign import Rotated
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.fp8 import FP8, FP8_E5M2
from omni_convert.formats.int8 import INT8
from omni_convert.formats.mxfp8 import MXFP8
from omni_convert.formats.nvfp4 import NVFP4

__all__ = ["COMFYUI"]

METADATA = "_quantization_metadata"
MARK = "comfy_quant"
LEGACY_MARK = "scaled_fp8"
NAMES = {"mul_scale": "pre_quant_scale"}
LEGACY_NAMES = {"weight_scale": "scale_weight", "input_scale": "scale_input"}
# Format in a mark → the method that it stands for.
METHODS = {
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "int8_tensorwise": "int8",
}
ELEMENTS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# Hardware on which ComfyUI runs a method without dequantizing it.
HARDWARE = {
    "fp8": "a GPU with FP8 (SM 8.9)",
    "int8": "a GPU with INT8 (SM 7.5)",
    "mxfp8": "Blackwell (SM 10.0)",
    "nvfp4": "Blackwell (SM 10.0)",
}
STABLE_DIFFUSION_CPP_METHODS = ("fp8", "int8")
SWIZZLED = ("mxfp8", "nvfp4")
MAX_MARK_BYTES = 4096
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FORMAT_NAMES = {FP8: "float8_e4m3fn", FP8_E5M2: "float8_e5m2", MXFP8: "mxfp8", NVFP4: "nvfp4", INT8: "int8_tensorwise"}
#: Rows and columns are padded to multiples of this.
PADDING = {"mxfp8": 32, "nvfp4": 16}
DEFAULT_ROTATION = 256


class ComfyUi(Dialect):
    """See the module."""

    name = "comfyui"
    consumers = "ComfyUI"
    runtimes = ("comfyui", *Dialect.runtimes)
    usual_verdicts = (
        NO_BLOCK,
        Verdict(DIFFUSERS, "wrong", "no reader of ComfyUI's scales; omni-convert dequantize gives BF16"),
        CONVERT_FIRST,
    )
    declared_by = "marks"
    is_single_file = True
    has_diffusers_names = False

    def recognises(self, found: Found) -> bool:
        return (
            METADATA in found.metadata
            or _legacy_mark(found) is not None
            or next(iter(found.stems(MARK)), None) is not None
        )

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        prefix, in_header = _prefix(found), _marks_in_header(found)
        marked = dict.fromkeys((*in_header, *found.stems(MARK)))
        layers = (
            (attempt(_marked_layer, found, stem, prefix, in_header.get(stem)) for stem in marked)
            if marked
            else (attempt(_layer, found, stem, LEGACY_NAMES, {}) for stem in found.stems(LEGACY_NAMES["weight_scale"]))
        )
        for layer in layers:
            if isinstance(layer, LayerError):
                yield layer
            else:
                yield replace(layer, stem=layer.stem.removeprefix(prefix), place=layer.stem)

    def kept_names(self, found: Found, stored: Collection[str]) -> dict[str, str]:
        mark, prefix = _legacy_mark(found), _prefix(found)
        return {name.removeprefix(prefix): name for name in stored if name != mark}

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        name = _format_name(fmt)
        if name is None:
            return f"ComfyUI has no format for {fmt.label}"
        padding = PADDING.get(name, 1)
        if shape[0] % padding or shape[1] % padding:
            return f"ComfyUI pads {name} to multiples of {padding}, which {shape[0]} x {shape[1]} is not"
        extras = {MARK: json.dumps({"format": name}).encode()}
        if name not in SWIZZLED:
            return WrittenSpelling(extras=extras)
        nibbles = {"weight": SwappedNibbles()} if name == "nvfp4" else {}
        return WrittenSpelling(codecs={"weight_scale": Swizzled(), **nibbles}, extras=extras)

    def metadata(self, layers: Mapping[str, Format]) -> dict[str, str]:
        marks = {stem: {"format": _format_name(layers[stem])} for stem in sorted(layers)}
        return {METADATA: json.dumps({"format_version": "1.0", "layers": marks})}

    def verdicts(
        self,
        layers: Mapping[str, Format],
        refusal: str | None = None,
        checkpoint: Checkpoint | None = None,
        family: Family | None = None,
    ) -> list[Verdict]:
        methods = {fmt.method for fmt in layers.values()}
        needs = ", ".join(f"{method} on {HARDWARE[method]}" for method in sorted(methods & HARDWARE.keys()))
        found = [Verdict(RUNTIME, "loads", f"as it is marked; runs {needs}, else dequantizes"), *self.usual_verdicts]
        if methods <= {*STABLE_DIFFUSION_CPP_METHODS}:
            why = "in versions that do not drop the scales of scaled FP8 (white images)"
            found.append(Verdict("stable-diffusion.cpp", "loads", why))
        return found

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        in_header = _marks_in_header(found) if layers else {}
        for stem, layer in layers.items():
            place = layer.place or stem
            mark = _mark(found, place) if found.get(place, MARK) is not None else None
            yield from _check_marks(stem, layer, mark, in_header.get(place, in_header.get(stem)))
        yield from _check_legacy_mark(found, layers)


def _check_marks(
    stem: str, layer: StoredLayer, mark: Mapping[str, Any] | None, in_header: Mapping[str, Any] | None
) -> Iterator[Finding]:
    """The marks of a layer, beside it and in the header, against each other and against its tensors."""
    beside, above = (None if each is None else str(each.get("format")) for each in (mark, in_header))
    if beside is not None and above is not None and beside != above:
        what = f"found {beside} in comfy_quant, {above} in the header"
        yield _bad_mark(stem, what, "ComfyUI: which of them counts depends on the version")
    declared = beside or above
    dtype = layer.format.layout(*layer.shape)["weight"].dtype
    if declared is not None and (
        METHODS.get(declared) != layer.format.method or ELEMENTS.get(declared) not in (None, dtype)
    ):
        what = f"found {layer.format.label} in {dtype}, but its mark says {declared}".replace("torch.", "")
        yield _bad_mark(stem, what, "ComfyUI: noise")


def _check_legacy_mark(found: Found, layers: Mapping[str, StoredLayer]) -> Iterator[Finding]:
    """The legacy mark of a whole file has the dtype of its weights."""
    name = _legacy_mark(found)
    if name is None:
        return
    declared = found.checkpoint[name].dtype
    for stem, layer in layers.items():
        dtype = layer.format.layout(*layer.shape)["weight"].dtype
        if dtype is not declared:
            what = f"found {dtype}, but {name} is {declared}".replace("torch.", "")
            yield _bad_mark(stem, what, "ComfyUI: takes codes for those of the other", "convert it again")


def _bad_mark(stem: str, what: str, hurts: str, remedy: str = "-m keep --dialect comfyui") -> Finding:
    return Finding("error", "bad-mark", stem, what, hurts, remedy)


def _format_name(fmt: Format) -> str | None:
    """ComfyUI's name of a format, or None; it has none for integers with static activations."""
    is_ours = isinstance(fmt, QuantizingFormat) and not fmt.is_storage
    return FORMAT_NAMES.get(fmt.encoding) if is_ours and fmt.encoding is not None else None


def _prefix(found: Found) -> str:
    """The prefix that files of a whole model have, if every name begins with it; else empty."""
    mark = _legacy_mark(found)
    names = [name for name in found.checkpoint if name != mark]
    return next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)), "")


def _place(found: Found, stem: str, prefix: str) -> str:
    """Where a layer's tensors are: its mark may leave out the prefix."""
    return prefix + stem if found.get(stem, "weight") is None and found.get(prefix + stem, "weight") else stem


def _legacy_mark(found: Found) -> str | None:
    """The marker's name, with whatever prefix the weights have."""
    return next((name for name in found.checkpoint if name.rpartition(".")[2] == LEGACY_MARK), None)


def _marks_in_header(found: Found) -> dict[str, Mapping[str, Any]]:
    where = f"{found.checkpoint.path}: {METADATA} in the header"
    layers = parse_json(found.metadata.get(METADATA, "{}").encode(), where).get("layers", {})
    if not isinstance(layers, Mapping):
        raise CheckpointError(f"{where}: found layers {str(layers)[:40]!r}, expected an object")
    return {stem: mark for stem, mark in layers.items() if isinstance(mark, Mapping)}


def _mark(found: Found, stem: str) -> Mapping[str, Any]:
    """The content of a layer's `comfy_quant`."""
    name = f"{stem}.{MARK}"
    spec = found.checkpoint[name]
    if spec.dtype.itemsize == 1 and spec.nbytes <= MAX_MARK_BYTES:
        try:
            mark = json.loads(found.checkpoint.read(name).reshape(-1).view(torch.uint8).numpy().tobytes())
        except (ValueError, RecursionError):
            mark = None
        if isinstance(mark, Mapping):
            return mark
    what = 'found no JSON object, expected {"format": ...}'
    raise LayerError(found, stem, f"tensor '{name}': {what}", "bad-mark")


def _marked_layer(found: Found, stem: str, prefix: str, in_header: Mapping[str, Any] | None) -> StoredLayer:
    """A layer that is marked beside its weight, or else in the header."""
    mark = _mark(found, stem) if in_header is None or found.get(stem, MARK) is not None else in_header
    stem = _place(found, stem, prefix)
    name = mark.get("format")
    if not isinstance(name, str) or name not in METHODS:
        what = f"found ComfyUI's format {str(name)[:40]!r}, expected one of {', '.join(METHODS)}; others are not read"
        raise LayerError(found, stem, f"layer '{stem}': {what}", "bad-mark")
    if found.get(stem, "weight") is None:
        what = f"tensor '{stem}.weight' is missing, expected with the layer's mark {name}"
        raise LayerError(found, stem, what, "missing-companion")
    return _layer(found, stem, NAMES, mark)


def _layer(found: Found, stem: str, names: Mapping[str, str], mark: Mapping[str, Any]) -> StoredLayer:
    """A layer, from its tensors and its mark."""
    name = mark.get("format")
    parts = parts_of(found, stem, names)
    if "weight" not in parts:
        what = f"tensor '{stem}.weight' is missing, expected with its scale"
        raise LayerError(found, stem, what, "missing-companion")
    signature = read_signature(parts, "high" if name == "nvfp4" else "low", swizzled=name in SWIZZLED)
    if signature is None:
        raise unknown_format(found, stem, parts)
    if mark.get("convrot"):
        group = mark.get("convrot_groupsize", DEFAULT_ROTATION)
        signature = _rotated(found, stem, signature, group)
    marks = (f"{stem}.{MARK}",) if found.get(stem, MARK) is not None else ()
    return replace(stored_layer(stem, signature, parts), unused=marks)


def _rotated(found: Found, stem: str, signature: Signature, group: Any) -> Signature:
    size = group if type(group) is int else 0
    power = size
    while power > 1 and power % 4 == 0:
        power //= 4
    if power != 1 or signature.shape[1] % size:
        what = f"found convrot_groupsize {group!r:.20} for {signature.shape[1]} columns"
        message = f"layer '{stem}': {what}, expected a power of four that divides them"
        raise LayerError(found, stem, message, "bad-mark")
    return replace(signature, format=Rotated(signature.format, size))


COMFYUI = ComfyUi()
