"""How compressed-tensors and llm-compressor spell a component; vLLM reads it.

Formats:  float-quantized        E4M3; weight_scale [1], [out, 1], or [out / N, in / K] in blocks; input_scale [1]
          int-quantized          I8; weight_scale [out, 1]
          mxfp8-quantized        E4M3; weight_scale U8 [out, in / 32]
          mxfp4-pack-quantized   weight_packed U8 [out, in / 2], even element in the low nibble; weight_scale U8
          nvfp4-pack-quantized   weight_packed as above; weight_scale E4M3 [out, in / 16]; weight_global_scale F32 [1],
                                 the reciprocal of weight_scale_2; input_global_scale, that of input_scale
          pack-quantized         weight_packed I32 [out, in * bits / 32], lowest bits first, offset by 2^(bits - 1);
                                 only read, and only for 4 and 8 bits without zero points
Block:    {"quant_method": "compressed-tensors", "format": ..., "config_groups": {GROUP: {"targets": [...], "weights":
          {...}, "input_activations": {...}, "format": ...}}, "ignore": [...]}; names exact, classes, or "re:PATTERN"
Limits:   mul_scale cannot be stored. A reciprocal that float32 does not hold changes by 2^-24; see `codec.Reciprocal`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK
from omni_convert.formats.dialects.base import (
    Dialect,
    Found,
    LayerError,
    StoredLayer,
    WrittenSpelling,
    attempt,
    two_sizes,
)
from omni_convert.formats.dialects.block_findings import block_mismatch, unknown_keys
from omni_convert.formats.dialects.codec import PackedValues, Plain, Reciprocal
from omni_convert.formats.dialects.detection import Signature, parts_of, signed_layers, stored_layer
from omni_convert.formats.dialects.packed_words import PackedRows, check_order
from omni_convert.formats.dialects.verdict import (
    CONVERT_FIRST,
    KEEP,
    UNKNOWN_METHOD,
    UNMARKED,
    VLLM_OMNI,
    Verdict,
)
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.foreign import Scaled
from omni_convert.formats.schemes.fp8 import FP8, FP8_PER_ROW, fp8_block_size
from omni_convert.formats.schemes.int8 import INT8
from omni_convert.formats.schemes.mxfp4 import MXFP4
from omni_convert.formats.schemes.mxfp8 import MXFP8
from omni_convert.formats.schemes.nvfp4 import NVFP4

__all__ = ["COMPRESSED_TENSORS"]

QUANT_METHOD = "compressed-tensors"
# The class of all layers in question, and what a pattern begins with, in lists of names.
LINEAR, PATTERN = "Linear", "re:"
PACKED = "weight_packed"
# The group of each column, where they were reordered.
ORDER = "weight_g_idx"
PACKED_NAMES = {"weight": PACKED, "weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
RECIPROCALS = {"weight_scale_2": Reciprocal(), "input_scale": Reciprocal()}
READABLE_BITS = (4, 8)
ONE, ONE_PER_ROW = Plain(shape=(1,)), Plain(shape=(-1, 1))
KNOWN_KEYS = (
    "quant_method", "format", "quantization_status", "config_groups", "ignore", "global_compression_ratio",
    "kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config", "version",
)  # fmt: skip
#: Method to the name of its layout.
LAYOUTS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "int8": "int-quantized",
    "fp8": "float-quantized",
}


class CompressedTensors(Dialect):
    """See the module."""

    name = "compressed-tensors"
    consumers = "vLLM, transformers"
    has_low_precision_scales = True
    looks_up_model_names = True
    mixed_methods = ("nvfp4", "fp8")
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "the name of the method is not in its registry", KEEP),
        UNKNOWN_METHOD,
        Verdict("vLLM, transformers", "loads", "for language models; with compressed-tensors installed"),
        CONVERT_FIRST,
        UNMARKED,
    )

    def recognises(self, found: Found) -> bool:
        return found.quant_method.replace("_", "-") == QUANT_METHOD

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        if found.block.get("transform_config"):
            raise CheckpointError(
                f"{found.checkpoint.path}: found transform_config in the config block, expected weights that are not "
                "rotated; export without a transform"
            )
        integers = {stem for stem in found.stems(PACKED) if found.checkpoint[f"{stem}.{PACKED}"].dtype is torch.int32}
        floats = signed_layers(found, PACKED_NAMES, RECIPROCALS)
        yield from (each for each in floats if isinstance(each, LayerError) or each.stem not in integers)
        yield from signed_layers(found)
        for stem in integers:
            yield attempt(_packed_integers, found, stem)

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        encoding = fmt.encoding
        if encoding == NVFP4:
            return WrittenSpelling(PACKED_NAMES, RECIPROCALS)
        if encoding == MXFP4 and shape[1] % 2 == 0:
            return WrittenSpelling({"weight": PACKED}, {"weight": PackedValues("low")})
        if encoding == FP8:
            return WrittenSpelling(codecs={"weight_scale": ONE, "input_scale": ONE})
        if fmt.activation_scheme == "dynamic":
            if encoding in (INT8, MXFP8):
                return WrittenSpelling()
            if encoding == FP8_PER_ROW:
                return WrittenSpelling(codecs={"weight_scale": ONE_PER_ROW})
            if fp8_block_size(fmt) is not None:
                return WrittenSpelling({"weight_scale_inv": "weight_scale"})
        return f"compressed-tensors has no layout for {fmt.label}" + (" with mul_scale" if fmt.is_smoothed else "")

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        schemes: dict[str, dict[str, Any]] = {}
        members: dict[str, list[str]] = {}
        for stem, fmt in layers.items():
            scheme = _scheme(fmt)
            schemes.setdefault(repr(scheme), scheme)
            members.setdefault(repr(scheme), []).append(stem)
        is_uniform = len(schemes) == 1
        groups = {
            f"group_{number}": {"targets": ["Linear"] if is_uniform else sorted(members[key]), **scheme}
            for number, (key, scheme) in enumerate(schemes.items())
        }
        formats = {scheme["format"] for scheme in schemes.values()}
        return {
            "quant_method": QUANT_METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(ignored),
        }

    def declared_blocks(self, block: Mapping[str, Any]) -> tuple[int, int] | None:
        groups = block.get("config_groups")
        groups = groups.values() if isinstance(groups, Mapping) else ()
        weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
        sizes = {two_sizes(each.get("block_structure")) for each in weights if isinstance(each, Mapping)}
        return sizes.pop() if len(sizes) == 1 else None

    def ignored_entries(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        return _listed(block.get("ignore"))

    def is_ignored(self, name: str, entries: Collection[str]) -> bool:
        return any(_matches(name, entry) for entry in entries)

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        groups = block.get("config_groups")
        groups = groups.values() if isinstance(groups, Mapping) else ()
        targets = [target for group in groups if isinstance(group, Mapping) for target in _listed(group.get("targets"))]
        return self.is_ignored(stem, targets) and not self.is_ignored(stem, self.ignored_entries(block))

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        yield from unknown_keys(found.block, KNOWN_KEYS, self.name, is_fatal=False)
        declared = str(found.block.get("format"))
        if declared not in LAYOUTS.values():
            return
        for stem, layer in layers.items():
            if LAYOUTS.get(layer.format.method, declared) != declared:
                what = f"found {layer.format.label}, but the config says {declared}"
                yield block_mismatch(stem, what, self.consumers)


def _listed(value: Any) -> tuple[str, ...]:
    return tuple(entry for entry in value if isinstance(entry, str)) if isinstance(value, list) else ()


def _matches(name: str, entry: str) -> bool:
    """Whether an entry means a linear: its class, its name, or a pattern that its name begins with."""
    if not entry.startswith(PATTERN):
        return entry in (LINEAR, name)
    try:
        return re.match(entry.removeprefix(PATTERN), name) is not None
    except re.error:
        return False


def _scheme(fmt: Format) -> dict[str, Any]:
    """The `config_groups` entry of a format: weights, activations, and the name of the layout."""
    encoding = fmt.encoding
    if encoding == NVFP4:
        blocks: dict[str, Any] = {
            "strategy": "tensor_group",
            "group_size": NVFP4_BLOCK,
            "scale_dtype": "torch.float8_e4m3fn",
        }
        inputs = _arguments(4, "float", dynamic="local", **blocks) if fmt.is_static else None
        return _group(LAYOUTS[fmt.method], _arguments(4, "float", **blocks), inputs)
    if encoding in (MXFP4, MXFP8):
        bits = 4 if encoding == MXFP4 else 8
        blocks = {"strategy": "group", "group_size": MX_BLOCK, "scale_dtype": "torch.uint8"}
        return _group(
            LAYOUTS[fmt.method], _arguments(bits, "float", **blocks), _arguments(bits, "float", dynamic=True, **blocks)
        )
    token: dict[str, Any] = {"strategy": "token", "dynamic": True}
    if encoding == INT8:
        return _group(LAYOUTS[fmt.method], _arguments(8, "int", strategy="channel"), _arguments(8, "int", **token))
    if (block_size := fp8_block_size(fmt)) is not None:
        weights = _arguments(8, "float", strategy="block", block_structure=list(block_size))
        inputs = _arguments(8, "float", strategy="group", group_size=block_size[1], dynamic=True)
        return _group(LAYOUTS[fmt.method], weights, inputs)
    weights = _arguments(8, "float", strategy="tensor" if encoding == FP8 else "channel")
    inputs = _arguments(8, "float", strategy="tensor") if fmt.is_static else _arguments(8, "float", **token)
    return _group(LAYOUTS[fmt.method], weights, inputs)


def _arguments(num_bits: int, kind: str, *, dynamic: bool | str = False, **others: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "dynamic": dynamic, **others}


def _group(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": layout}


def _packed_integers(found: Found, stem: str) -> StoredLayer:
    """A layer of `pack-quantized`."""
    parts = parts_of(found, stem, {"weight": PACKED})
    shape_name = f"{stem}.weight_shape"
    shape_spec = found.checkpoint.get(shape_name)
    if "weight_scale" not in parts or shape_spec is None or shape_spec.elements != 2:
        what = f"found {PACKED} alone, expected weight_scale and weight_shape beside it"
        raise LayerError(found, stem, f"layer '{stem}': {what}", "missing-companion")
    rows, columns = (int(size) for size in found.checkpoint.read(shape_name).flatten().tolist())
    words = parts["weight"].shape
    bits = words[1] * 32 // columns if columns > 0 and len(words) == 2 else 0
    if bits not in READABLE_BITS or "weight_zero_point" in parts:
        what = f"found integers of {bits} bits or zero points, expected 4 or 8 bits without any"
        raise LayerError(found, stem, f"layer '{stem}': {what}")
    groups = parts["weight_scale"].elements // rows if rows > 0 else 0
    group = None if groups == 1 else -(-columns // groups) if groups else None
    order = found.get(stem, ORDER)
    if order is not None:
        check_order(found, stem, ORDER, columns, group)
    fmt = Scaled(f"int{bits}", torch.int8, group)
    signature = Signature(fmt, (rows, columns), {"weight": PackedRows(bits)})
    unused = (shape_name, *([order.name] if order is not None else []))
    return replace(stored_layer(stem, signature, parts), unused=unused)


COMPRESSED_TENSORS = CompressedTensors()
