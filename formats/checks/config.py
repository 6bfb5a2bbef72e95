"""Checks what a config block, a mark or a label says against the tensors, and against what the runtimes know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.checks.finding import Finding
from omni_convert.formats.checks.reading import LenientReading
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects import omni_convert, transformers, vllm_omni
from omni_convert.formats.dialects.base import Found
from omni_convert.formats.errors import OmniConvertError, nearest
from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import FP8, fp8_block_size
from omni_convert.formats.mxfp8 import MXFP8
from omni_convert.formats.nvfp4 import NVFP4
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = ["check_block"]

VLLM_OMNI = "vLLM-Omni"
OUR_METHOD = omni_convert.QUANT_METHOD
FIX_BLOCK = "correct quantization_config in config.json, or convert with -m keep"
LABELS = {
    "W8A8_DYNAMIC": "int8",
    "WFP8AFP8_DYNAMIC": "fp8",
    "W8A8_MXFP8": "mxfp8",
    "W4A4_MXFP4": "mxfp4",
    "W4A4_MXFP4_DUALSCALE": "mxfp4_dualscale",
}
MARKS = {"mxfp8": "mxfp8", "nvfp4": "nvfp4", "int8_tensorwise": "int8", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
MARK_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
PACKINGS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "int8": "int-quantized",
    "fp8": "float-quantized",
}
KNOWN_KEYS = {
    "compressed-tensors": (
        "quant_method", "format", "quantization_status", "config_groups", "ignore", "global_compression_ratio",
        "kv_cache_scheme", "sparsity_config", "transform_config", "version",
    ),
    "transformers": (
        "quant_method", "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers",
        "modules_to_convert", "dequantize", "fmt", "scale_fmt", "expert_dtype",
    ),
}  # fmt: skip


def check_block(reading: LenientReading, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything that is wrong with what is said about a component.

    Args:
        config: its config.json; {} if there is none
    """
    dialect, block = reading.quantized.dialect, reading.found.block
    method = str(block.get("quant_method", ""))
    if dialect == "vllm-omni":
        yield from _vllm_omni(reading)
    elif vllm_omni.serialized_flag(method) and not (dialect == "transformers" and _has_inverse_scales(reading.found)):
        yield _no_flag(method)
    elif block and dialect in (None, "bfl", "lightx2v"):
        yield Finding(
            "error" if reading.quantized.layers else "warning", "unknown-method", "",
            f"found quant_method {method[:40]!r}, which none of the dialects here has",
            "every runtime but its owner", FIX_BLOCK,
        )  # fmt: skip
    elif dialect in ("bfl", "lightx2v") and "_class_name" in config and reading.quantized.layers:
        yield Finding(
            "error", "no-block", "", "found quantized layers, but no quantization_config beside them",
            "vLLM-Omni, diffusers: take codes for weights", "convert with -m keep --dialect vllm-omni",
        )  # fmt: skip
    if dialect == "modelopt" and "_class_name" in config and "quantization_config" not in config:
        yield Finding(
            "error", "no-block", "", "found the block in a file beside config.json, expected it in quantization_config",
            "vLLM-Omni: reads config.json only, and takes codes for weights", "-m keep --dialect modelopt",
        )  # fmt: skip
    if dialect in KNOWN_KEYS:
        yield from _unknown_keys(block, KNOWN_KEYS[dialect], "warning", dialect)
    checks = {
        "modelopt": _modelopt,
        "compressed-tensors": _compressed_tensors,
        "auto-round": _auto_round,
        "transformers": _transformers,
        "msmodelslim": _msmodelslim,
        "comfyui": _comfyui,
    }
    if dialect in checks:
        yield from checks[dialect](reading)


def _has_inverse_scales(found: Found) -> bool:
    return next(iter(found.stems("weight_scale_inv")), None) is not None


def _no_flag(method: str) -> Finding:
    return Finding(
        "error", "no-serialized-flag", "", f"found {method} without {vllm_omni.serialized_flag(method)}: true",
        f"{VLLM_OMNI}: quantizes online, that is, takes the codes for weights and quantizes them again", FIX_BLOCK,
    )  # fmt: skip


def _unknown_keys(block: Mapping[str, Any], known: tuple[str, ...], severity: Any, reader: str) -> Iterator[Finding]:
    for key in block:
        if key not in known:
            near = nearest(str(key), known)
            remedy = f"did you mean '{near}'? else remove it" if near is not None else "remove it"
            yield Finding(
                severity, "unknown-key", "", f"found {str(key)[:64]!r} in quantization_config", f"{reader}: "
                + ("TypeError at startup" if severity == "error" else "ignores or refuses it"), remedy,
            )  # fmt: skip


def _vllm_omni(reading: LenientReading) -> Iterator[Finding]:
    block = dict(reading.found.block)
    if block.get("quant_method") == OUR_METHOD:
        block["quant_method"] = block.pop("method", None)
    method = block.get("quant_method")
    flag = vllm_omni.serialized_flag(method) if isinstance(method, str) else None
    if not isinstance(method, str) or flag is None:
        if method == vllm_omni.MODELOPT:
            return
        yield Finding("error", "bad-block", "", f"found method {str(method)[:40]!r}", VLLM_OMNI, FIX_BLOCK)
        return
    known = vllm_omni.known_keys(method)
    yield from _unknown_keys(block, known, "error", VLLM_OMNI)
    if block.get(flag) is not True:
        yield _no_flag(method)
        return
    try:
        said = vllm_omni.from_block({key: value for key, value in block.items() if key in known}, "config.json")
    except OmniConvertError as error:
        yield Finding("error", "bad-block", "", str(error).removeprefix("config.json: "), VLLM_OMNI, FIX_BLOCK)
        return
    for stem, layer in reading.quantized.layers.items():
        if (difference := _difference(said, layer.format)) is not None:
            yield _mismatch(stem, difference, VLLM_OMNI)


def _mismatch(stem: str, what: str, reader: str) -> Finding:
    return Finding("error", "block-mismatch", stem, what, f"{reader}: fails to load, or computes noise", FIX_BLOCK)


def _difference(said: QuantizationConfig, fmt: Format) -> str | None:
    """How a layer differs from what the block says of all layers."""
    if fmt.method != said.method:
        return f"found {fmt.label}, but the config says {said.method}"
    if fmt.is_static != said.is_static:
        what = "an input_scale" if fmt.is_static else "no input_scale"
        return f"found {what}, but the config says {said.activation_scheme} activations"
    block_size = fp8_block_size(fmt)
    if block_size != said.weight_block_size:
        found, stated = (
            "one scale" if sizes is None else f"blocks of {list(sizes)}"
            for sizes in (block_size, said.weight_block_size)
        )
        return f"found {found}, but the config says {stated}"
    if said.require_smooth_scale and not fmt.is_smoothed:
        return "found no mul_scale, but the config says require_smooth_scale"
    return None


def _modelopt(reading: LenientReading) -> Iterator[Finding]:
    block = reading.found.block
    nested = block.get("quantization")
    algorithm = str((nested if isinstance(nested, Mapping) else block).get("quant_algo"))
    if algorithm in ("FP8", "NVFP4") and block.get("quant_method") == vllm_omni.MODELOPT and "config_groups" in block:
        try:
            vllm_omni.from_block(block, "config.json")
        except OmniConvertError as error:
            yield Finding("error", "bad-block", "", str(error).removeprefix("config.json: "), VLLM_OMNI, FIX_BLOCK)
            return
    for stem, layer in reading.quantized.layers.items():
        fmt = layer.format.innermost
        said = _said_by_modelopt(block, algorithm, stem)
        if said is None:
            continue
        if ("NVFP4" in said) != (fmt.method == "nvfp4") or ("MXFP8" in said) != (fmt.method == "mxfp8"):
            yield _mismatch(stem, f"found {fmt.label}, but the config says {said}", "vLLM-Omni, vLLM")
        elif fmt.encoding in (FP8, NVFP4) and not fmt.is_static and _needs_input_scale(block, said):
            yield Finding(
                "error", "missing-companion", f"{stem}.input_scale", f"found none, expected it with {said}",
                "vLLM-Omni, vLLM: only warn, and quantize inputs with an unset scale", "calibrate, with --calib",
            )  # fmt: skip


def _said_by_modelopt(block: Mapping[str, Any], algorithm: str, stem: str) -> str | None:
    if algorithm != "MIXED_PRECISION":
        return algorithm if algorithm != "None" else None
    layers = block.get("quantized_layers")
    said = layers.get(stem) if isinstance(layers, Mapping) else None
    return str(said.get("quant_algo")) if isinstance(said, Mapping) else None


def _needs_input_scale(block: Mapping[str, Any], said: str) -> bool:
    if said == "FP8":
        return True
    groups = block.get("config_groups")
    if said != "NVFP4" or not isinstance(groups, Mapping):
        return False
    return any(isinstance(group, Mapping) and group.get("input_activations") for group in groups.values())


def _compressed_tensors(reading: LenientReading) -> Iterator[Finding]:
    said = str(reading.found.block.get("format"))
    if said not in PACKINGS.values():
        return
    for stem, layer in reading.quantized.layers.items():
        packing = PACKINGS.get(layer.format.method)
        if packing is not None and packing != said:
            yield _mismatch(stem, f"found {layer.format.label}, but the config says {said}", "vLLM, transformers")


def _auto_round(reading: LenientReading) -> Iterator[Finding]:
    said = reading.found.block.get("group_size")
    for stem, layer in reading.quantized.layers.items():
        encoding = layer.format.encoding
        if encoding is None or not isinstance(encoding.element, IntegerType):
            continue
        _, group = encoding.block
        whole = said in (-1, None) or (type(said) is int and said >= layer.shape[1])
        if group != (None if whole else said):
            yield _mismatch(stem, f"found groups of {group or 'a row'}, but the config says {said}", "vLLM, diffusers")


def _transformers(reading: LenientReading) -> Iterator[Finding]:
    said, scale_format = (reading.found.block.get(key) for key in ("weight_block_size", "scale_fmt"))
    for stem, layer in reading.quantized.layers.items():
        blocks = transformers.block_size(layer.format)
        if blocks is not None and isinstance(said, list) and tuple(said) != blocks:
            yield _mismatch(stem, f"found blocks of {list(blocks)}, but the config says {said}", "transformers")
        if layer.format.encoding == MXFP8 and scale_format != transformers.BYTE_SCALES:
            what = f"found scales that are powers of two, but the config says scale_fmt {str(scale_format)[:40]}"
            yield _mismatch(stem, what, "transformers, on a GPU")
        if (reason := transformers.cut_short(layer.format, layer.shape)) is not None:
            yield Finding(
                "warning", "indivisible-width", stem, reason, "transformers without a GPU for FP8: wrong or refused",
                "leave the layer unquantized, or use a GPU",
            )  # fmt: skip


def _msmodelslim(reading: LenientReading) -> Iterator[Finding]:
    reader = "vLLM-Ascend, MindIE"
    for name, label in reading.found.labels.items():
        if name not in reading.found.checkpoint and "." in name and label in (*LABELS, "FLOAT"):
            yield Finding("error", "bad-mark", name, f"found the label {label} for no tensor", reader, "label it again")
    for stem, layer in reading.quantized.layers.items():
        said = LABELS.get(reading.found.labels.get(layer.stored.name_of("weight"), ""))
        if said is not None and said != layer.format.method:
            yield _mismatch(stem, f"found {layer.format.label}, but its label says {said}", reader)


def _comfyui(reading: LenientReading) -> Iterator[Finding]:
    header = _header_marks(reading.found)
    for stem, layer in reading.quantized.layers.items():
        place = layer.stored.place or stem
        tensor, text = _tensor_mark(layer, place), header.get(place, header.get(stem))
        if tensor is not None and text is not None and tensor != text:
            what = f"found {tensor} in comfy_quant, {text} in the header"
            yield Finding("error", "bad-mark", stem, what, "ComfyUI: which of them counts depends on the version", "-m keep --dialect comfyui")  # noqa: E501  # fmt: skip
        mark = tensor or text
        if mark is not None and not _fits(mark, layer):
            what = f"found {layer.format.label} in {layer.tensors['weight'].dtype}".replace("torch.", "")
            yield Finding("error", "bad-mark", stem, f"{what}, but its mark says {mark}", "ComfyUI: noise", "-m keep --dialect comfyui")  # noqa: E501  # fmt: skip
    yield from _sentinel(reading)


def _fits(mark: str, layer: QuantizedLayer) -> bool:
    return MARKS.get(mark) == layer.format.method and MARK_DTYPES.get(mark) in (None, layer.tensors["weight"].dtype)


def _header_marks(found: Found) -> dict[str, str]:
    try:
        layers = json.loads(found.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return {stem: str(mark.get("format")) for stem, mark in layers.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}


def _tensor_mark(layer: QuantizedLayer, place: str) -> str | None:
    name = f"{place}.comfy_quant"
    if name not in layer.checkpoint:
        return None
    text = layer.checkpoint.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(json.loads(text).get("format"))


def _sentinel(reading: LenientReading) -> Iterator[Finding]:
    """The legacy mark of a whole file tells the dtype of its weights."""
    name = next((name for name in reading.found.checkpoint if name.rpartition(".")[2] == "scaled_fp8"), None)
    if name is None:
        return
    said = reading.found.checkpoint[name].dtype
    for stem, layer in reading.quantized.layers.items():
        if layer.tensors["weight"].dtype is not said:
            what = f"found {layer.tensors['weight'].dtype}, but {name} is {said}".replace("torch.", "")
            yield Finding("error", "bad-mark", stem, what, "ComfyUI: takes codes for those of the other", "convert it again")  # noqa: E501  # fmt: skip
