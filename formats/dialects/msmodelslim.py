"""How Ascend's msModelSlim writes a model: a file of labels beside the weights, and the model's original names.

Labels:   quant_model_description*.json: {TENSOR: "FLOAT" or a type, ..., "model_quant_type": the type with the fewest
          bits, "group_size": 32 with MX, else 0, "version": "1.0.0", "metadata": {}, "optional": {}}
Types:    W8A8_DYNAMIC          I8; weight_scale F32 [out, 1]; weight_offset of zeros
          W8A8                  I8; deq_scale [out], F32 or its bits as I64, is weight_scale * input_scale; the former
                                may be stored too; input_scale, input_offset, quant_bias for static activations
          WFP8AFP8_DYNAMIC      E4M3; the same scales
          W8A8_MXFP8            E4M3; weight_scale U8 [out, in / 32]
          W4A4_MXFP4            U8 [out, in / 2], even element in the low nibble; weight_scale U8 [out, in / 32]
          W4A4_MXFP4_DUALSCALE  as before, or the values as E4M3 [out, in]; weight_dual_scale F32 [out, in / 512, 1]
Wrappers: a smoothed layer is NAME.linear.* and NAME.div.mul_scale, which multiplies inputs
Limits:   smoothed layers, static W8A8 and dual scales are only read, and names are written as diffusers has them.
          Wan's original names become diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import (
    Dialect,
    Found,
    LayerError,
    Spelling,
    StoredLayer,
    WrittenSpelling,
    attempt,
)
from omni_convert.formats.dialects.block_findings import block_mismatch
from omni_convert.formats.dialects.codec import Codec, PackedValues
from omni_convert.formats.dialects.detection import parts_of, read_signature, stored_layer, unknown_format
from omni_convert.formats.dialects.verdict import CONVERT_FIRST, DIFFUSERS, KEEP, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.families.wan import has_original_wan_names, wan_diffusers_name
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.foreign import Scaled
from omni_convert.formats.schemes.int8 import INT8
from omni_convert.formats.schemes.mxfp4 import MXFP4
from omni_convert.formats.schemes.mxfp8 import MXFP8

__all__ = ["MSMODELSLIM"]

FLOAT = "FLOAT"
#: Labels that are read, and the method that each stands for.
METHODS = {
    "W8A8": "int8",
    "W8A8_DYNAMIC": "int8",
    "WFP8AFP8_DYNAMIC": "fp8",
    "W8A8_MXFP8": "mxfp8",
    "W4A4_MXFP4": "mxfp4",
    "W4A4_MXFP4_DUALSCALE": "mxfp4_dualscale",
}
STATIC_LABEL = "W8A8"
# Beside a weight of this type.
STATIC = ("deq_scale", "quant_bias", "input_offset", "weight_offset")
LABEL = re.compile(r"W\d+A\d+\w*|WFP8\w*")
DESCRIPTION = "quant_model_description.json"
# The type of a model of several is the last of these.
WRITTEN = {INT8: "W8A8_DYNAMIC", MXFP8: "W8A8_MXFP8", MXFP4: "W4A4_MXFP4"}
# Tensors of wrappers that rotate inputs; the weights inside them are rotated, too.
ROTATIONS = ("heads_rotation", "kronecker_rotation_m", "kronecker_rotation_n")
LINEAR, DIVISION = ".linear", ".div.mul_scale"


class MsModelSlim(Dialect):
    """See the module."""

    name = "msmodelslim"
    consumers = "vLLM-Ascend, MindIE"
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "reads the description for HunyuanImage-3.0 only", KEEP),
        Verdict(DIFFUSERS, "refuses", "neither the names of the files nor the scales are known to it"),
        CONVERT_FIRST,
        UNMARKED,
    )
    declared_by = "marks"
    names_expected = "source"

    def recognises(self, found: Found) -> bool:
        return any(name in found.checkpoint and LABEL.fullmatch(label) for name, label in found.labels.items())

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        for leaf in ROTATIONS:
            for stem in found.stems(leaf):
                what = "found inputs that are rotated at run time, expected a plain linear; export without it"
                yield LayerError(found, stem, f"tensor '{stem}.{leaf}': {what}")
        for place in found.stems():
            label = found.labels.get(f"{place}.weight", FLOAT)
            if label != FLOAT:
                yield attempt(_layer, found, place, label)

    def kept_names(self, found: Found, stored: Collection[str]) -> dict[str, str]:
        return {_renamed(found, _unwrapped(found, name)): name for name in stored}

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if _label(fmt) is None:
            return f"msModelSlim's files are written for int8, mxfp8 and mxfp4 without mul_scale, found {fmt.label}"
        if fmt.encoding == INT8:
            return WrittenSpelling(zeros={"weight_offset": "weight_scale"})
        return WrittenSpelling(codecs={"weight": PackedValues("low")} if fmt.encoding == MXFP4 else {})

    def sidecars(self, layers: Mapping[str, Format], names: Collection[str]) -> dict[str, dict[str, Any]]:
        labels: dict[str, str] = dict.fromkeys(names, FLOAT)
        types = {stem: label for stem, fmt in layers.items() if (label := _label(fmt)) is not None}
        for stem, label in types.items():
            suffixes = ("weight", "weight_scale", "weight_offset")
            labels |= {f"{stem}.{suffix}": label for suffix in suffixes if f"{stem}.{suffix}" in labels}
        used = set(types.values())
        model = {
            "group_size": MX_BLOCK if used & {WRITTEN[MXFP8], WRITTEN[MXFP4]} else 0,
            "metadata": {},
            "model_quant_type": next((each for each in reversed(WRITTEN.values()) if each in used), FLOAT),
            "optional": {},
            "version": "1.0.0",
        }
        return {DESCRIPTION: dict(sorted(labels.items())) | model}

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        for name, label in found.labels.items():
            if name not in found.checkpoint and "." in name and label in (*METHODS, FLOAT):
                what = f"found the label {label} for no tensor"
                yield Finding("error", "bad-mark", name, what, self.consumers, "label it again")
        for stem, layer in layers.items():
            declared = METHODS.get(found.labels.get(layer.name_of("weight"), ""))
            if declared is not None and declared != layer.format.method:
                what = f"found {layer.format.label}, but its label says {declared}"
                yield block_mismatch(stem, what, self.consumers)


def _label(fmt: Format) -> str | None:
    """The type of a format that is written, or None."""
    return WRITTEN.get(fmt.encoding) if fmt.encoding and fmt.activation_scheme == "dynamic" else None


def _unwrapped(found: Found, name: str) -> str:
    """The name of a tensor beside a quantized weight, without the wrapper of a smoothed layer."""
    stem, _, leaf = name.rpartition(".")
    is_wrapped = stem.endswith(LINEAR) and found.labels.get(f"{stem}.weight", FLOAT) != FLOAT
    return f"{stem.removesuffix(LINEAR)}.{leaf}" if is_wrapped else name


def _renamed(found: Found, name: str) -> str:
    return wan_diffusers_name(name) if has_original_wan_names(found.checkpoint) else name


@dataclass(frozen=True)
class _ProductOfScales(Codec):
    """`weight_scale * input_scale`, F32 or its bits as I64, instead of the first alone."""

    input_scale: float

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return TensorLayout(torch.float32, layout.shape[:1])

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        is_fit = spec.dtype in (torch.float32, torch.int64) and spec.shape == layout.shape[:1]
        return None if is_fit else super().mismatch(spec, layout)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        product = stored.to(torch.int32).view(torch.float32) if stored.dtype is torch.int64 else stored
        return (product / self.input_scale).view(-1, 1)


def _static_layer(found: Found, place: str) -> StoredLayer:
    """A layer of W8A8, whose activations have one scale and one offset."""
    scale, weight_scale = found.get(place, "input_scale"), found.get(place, "weight_scale")
    shape = found.checkpoint[f"{place}.weight"].shape
    if scale is None or scale.elements != 1 or len(shape) != 2 or found.get(place, "deq_scale") is None:
        what = "found no input_scale and deq_scale, expected both with type W8A8"
        raise LayerError(found, place, f"layer '{place}': {what}", "missing-companion")
    names = {} if weight_scale is not None else {"weight_scale": "deq_scale"}
    product = _ProductOfScales(float(found.checkpoint.read(scale.name)))
    spelling = Spelling(names, {} if weight_scale is not None else {"weight_scale": product})
    used = {"weight_scale" if weight_scale is not None else "deq_scale"}
    unused = (f"{place}.{leaf}" for leaf in STATIC if leaf not in used and found.get(place, leaf) is not None)
    fmt = Scaled("int8", torch.int8, static=True)
    name = _renamed(found, f"{place}.weight").removesuffix(".weight")
    return StoredLayer(name, fmt, (shape[0], shape[1]), spelling, place=place, unused=tuple(unused))


def _layer(found: Found, place: str, label: str) -> StoredLayer:
    if label == STATIC_LABEL:
        return _static_layer(found, place)
    if label not in METHODS:
        what = f"found type {label[:40]!r}, expected one of {', '.join(METHODS)}"
        raise LayerError(found, place, f"layer '{place}': {what}", "bad-mark")
    stem = place.removesuffix(LINEAR)
    parts = parts_of(found, place, {})
    divided = found.checkpoint.get(f"{stem}{DIVISION}")
    if divided is not None and stem != place:
        parts["mul_scale"] = divided
    offset = f"{place}.weight_offset"
    unused: tuple[str, ...] = ()
    if offset in found.checkpoint:
        if bool((found.checkpoint.read(offset) != 0).any()):
            raise LayerError(found, place, f"tensor '{offset}': found other numbers than 0, expected 0")
        unused = (offset,)
    if label == "W4A4_MXFP4_DUALSCALE" and "weight_dual_scale" not in parts:
        raise unknown_format(found, place, parts)
    signature = read_signature(parts)
    if signature is None:
        raise unknown_format(found, place, parts)
    ones = () if "mul_scale" in parts else ("mul_scale",)
    name = _renamed(found, f"{stem}.weight").removesuffix(".weight")
    return replace(stored_layer(name, signature, parts), place=place, unused=unused, ones=ones)


MSMODELSLIM = MsModelSlim()
