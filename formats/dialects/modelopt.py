"""How NVIDIA's ModelOpt exports a component: vLLM, vLLM-Omni, SGLang and TensorRT-LLM read it.

Tensors:  NAME.weight, NAME.weight_scale, NAME.weight_scale_2, NAME.input_scale, as the formats define them;
          NAME.pre_quant_scale [in] where inputs are smoothed
          FP8                        E4M3, one scale, input_scale
          FP8_PER_CHANNEL_PER_TOKEN  E4M3, F32 [out]; also how one scale without input_scale is kept
          FP8_PB_WO                  E4M3, F32 [out / 128, 1, in / 128, 1], weight only
          MXFP8                      E4M3, U8 [out, in / 32]
          NVFP4, W4A16_NVFP4         low nibble first, linear scales; without input_scale weight only
Block:    {"quant_method": "modelopt", "quant_algo": ..., "config_groups": ..., "ignore": [...], "producer": ...} in
          config.json; in the older shape {"quantization": {"quant_algo": ..., "exclude_modules": [...]}} of a sidecar.
          MIXED_PRECISION has `quantized_layers`: {NAME: {"quant_algo": ...}}. Readers leave unquantized what is not
          listed; vLLM-Omni (0.30.0) looks merged layers up by its own names, `to_qkv`. It reads MXFP8 in this block
          alone, which is therefore the one that is written.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from omni_convert.formats.dialects.base import Dialect, Found, JudgedComponent, LayerError, StoredLayer, WrittenSpelling
from omni_convert.formats.dialects.block_findings import FIX_BLOCK, block_mismatch
from omni_convert.formats.dialects.codec import Plain, Repeated
from omni_convert.formats.dialects.detection import signed_layers
from omni_convert.formats.dialects.modelopt_config import MIXED_PRECISION, MODELOPT, spell_algorithms
from omni_convert.formats.dialects.verdict import (
    CONVERT_FIRST,
    DIFFUSERS,
    OURS,
    REQUANTIZE,
    UNMARKED,
    VLLM_OMNI,
    Verdict,
)
from omni_convert.formats.dialects.vllm_omni import flaw_of_block, vllm_omni_verdict
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.foreign import LowRank, Smoothed
from omni_convert.formats.schemes.fp8 import FP8, FP8_PER_ROW, fp8_block_size
from omni_convert.formats.schemes.mxfp8 import MXFP8
from omni_convert.formats.schemes.nvfp4 import NVFP4

__all__ = ["MODELOPT_DIALECT"]

NAMES = {"mul_scale": "pre_quant_scale"}
#: The algorithm that vLLM-Omni refuses for a whole model, and reads in a mixture.
MXFP8_ALONE = "MXFP8"
BRANCH = {"lora_a": "svdquant_lora_a", "lora_b": "svdquant_lora_b"}
REFUSES_SMOOTHED = "its adapter raises for pre_quant_scale; -m METHOD quantizes again"
# Labels of the formats that our loader reads alone, and beside others.
LOADED_ALONE = {"fp8", "fp8 static", "fp8 per row", "nvfp4"}
LOADED_IN_MIXTURES = LOADED_ALONE | {"mxfp8"}


class ModelOpt(Dialect):
    """See the module."""

    name = "modelopt"
    low_precision_parts = ("mul_scale", "lora_a", "lora_b")
    consumers = "vLLM-Omni, vLLM, SGLang"
    usual_verdicts = (
        Verdict(DIFFUSERS, "refuses", "its `modelopt` is another kind of checkpoint (quant_type is missing)"),
        Verdict("SGLang", "loads", "FP8 after a build step of its own, static if there is an input_scale; NVFP4"),
        UNMARKED,
    )
    fills_vllm_omni_parameters = True
    ignores_merged_layers_by_name = True
    lists_runtime_names = True
    is_dynamic_fp8_per_row = True
    mixed_methods = ("nvfp4", "fp8")

    def recognises(self, found: Found) -> bool:
        producer = found.block.get("producer")
        is_theirs = isinstance(producer, Mapping) and producer.get("name") == MODELOPT
        return is_theirs or found.quant_method.startswith(MODELOPT) or isinstance(found.block.get("quantization"), dict)

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        branched = {*found.stems(BRANCH["lora_a"])}
        for layer in signed_layers(found, NAMES):
            if isinstance(layer, StoredLayer) and layer.stem in branched:
                yield _with_branch(found, layer)
            else:
                yield layer

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if fmt.encoding == FP8 and not fmt.is_static:
            return WrittenSpelling(codecs={"weight_scale": Repeated((shape[0],))})
        if fmt.encoding == FP8_PER_ROW and not fmt.is_static:
            return WrittenSpelling(codecs={"weight_scale": Plain(shape=(-1,))})
        if fmt.encoding in (FP8, NVFP4, MXFP8):
            return WrittenSpelling()
        if fp8_block_size(fmt) is not None:
            return "ModelOpt's FP8 in blocks is weight-only, which these weights were not made for"
        return f"ModelOpt has no reader for {fmt.label}"

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        algorithms = {stem: _algorithm(fmt) for stem, fmt in layers.items()}
        kinds = set(algorithms.values())
        return spell_algorithms(algorithms, ignored, is_mixed=len(kinds) > 1 or kinds == {MXFP8_ALONE})

    def block_flaw(self, block: Mapping[str, Any]) -> str | None:
        algorithm = _flat(block).get("quant_algo")
        is_described = block.get("quant_method") == MODELOPT and "config_groups" in block
        is_for_vllm_omni = algorithm == MXFP8_ALONE or (algorithm in ("FP8", "NVFP4") and is_described)
        return flaw_of_block(block) if is_for_vllm_omni else None

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        formats = component.layers.values()
        if any(_is_smoothed_nvfp4(fmt) for fmt in formats):
            refused = Verdict(VLLM_OMNI, "refuses", REFUSES_SMOOTHED)
            return [refused, *(each for each in self.usual_verdicts if each.outcome != "loads"), REQUANTIZE]
        labels = {fmt.label for fmt in formats}
        is_mixture = component.refusal is None or len(labels) > 1
        is_loaded = labels <= LOADED_ALONE or (is_mixture and labels <= LOADED_IN_MIXTURES)
        return [
            self._vllm_omni_verdict(component.methods, component.refusal),
            *self.usual_verdicts,
            Verdict(OURS, "loads", "FP8, NVFP4 and mixtures") if is_loaded else CONVERT_FIRST,
        ]

    def _vllm_omni_verdict(self, methods: Collection[str], refusal: str | None) -> Verdict:
        if self.is_dequantized_by_vllm_omni(methods):
            return Verdict(VLLM_OMNI, "loads", "on CUDA; it dequantizes layers that it builds unquantized; not Wan")
        # In its own spelling, MXFP8 is for Ascend.
        return vllm_omni_verdict({*methods} - {"mxfp8"}, refusal)

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        block = found.block
        if "_class_name" in config and "quantization_config" not in config:
            yield Finding(
                "error", "no-block", "",
                "found the block in a file beside config.json, expected it in quantization_config",
                "vLLM-Omni: reads config.json only, and takes codes for weights", "-m keep --dialect modelopt",
            )  # fmt: skip
        if (what := self.block_flaw(block)) is not None:
            yield Finding("error", "bad-block", "", what, "vLLM-Omni", FIX_BLOCK)
            if _flat(block).get("quant_algo") != MXFP8_ALONE:
                return
        smoothed = next((stem for stem, layer in layers.items() if _is_smoothed_nvfp4(layer.format)), None)
        if smoothed is not None:
            yield Finding(
                "error", "extra-companion", f"{smoothed}.{NAMES['mul_scale']}", "found smoothed inputs for NVFP4",
                f"vLLM-Omni: {REFUSES_SMOOTHED}", "-m METHOD quantizes again",
            )  # fmt: skip
        for stem, layer in layers.items():
            if (declared := _declared_algorithm(block, stem)) is not None:
                yield from _check_algorithm(stem, layer, declared, block)

    def ignored_entries(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        listed = block.get("ignored_layers", block.get("ignore", _flat(block).get("exclude_modules")))
        return tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()

    def is_ignored(self, name: str, entries: Collection[str]) -> bool:
        return any(entry in name or fnmatch.fnmatchcase(name, entry) for entry in entries)

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        is_listed = _flat(block).get("quant_algo") == MIXED_PRECISION
        return not is_listed and not self.is_ignored(stem, self.ignored_entries(block))

    def leaves_unlisted(self, block: Mapping[str, Any], stem: str) -> bool:
        return False

    def is_dequantized_by_vllm_omni(self, methods: Collection[str]) -> bool:
        return set(methods) == {"fp8"}


def _is_smoothed_nvfp4(fmt: Format) -> bool:
    return fmt.innermost is not fmt and fmt.innermost.encoding == NVFP4


def _with_branch(found: Found, layer: StoredLayer) -> StoredLayer | LayerError:
    """A layer of SVDQuant: the branch is added to the weight before its columns are multiplied."""
    down = found.checkpoint[f"{layer.stem}.{BRANCH['lora_a']}"]
    if len(down.shape) != 2:
        what = f"found {BRANCH['lora_a']} of {list(down.shape)}, expected [rank, in]"
        return LayerError(found, layer.stem, f"layer '{layer.stem}': {what}", "wrong-shape")
    rank, fmt = down.shape[0], layer.format
    with_branch = Smoothed(LowRank(fmt.inner, rank)) if isinstance(fmt, Smoothed) else LowRank(fmt, rank)
    places = {suffix: f"{layer.stem}.{name}" for suffix, name in BRANCH.items()}
    return replace(layer, format=with_branch, places={**layer.places, **places})


def _flat(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a block that describes the layers: the block itself, or in the older shape an object inside it."""
    nested = block.get("quantization")
    return nested if isinstance(nested, Mapping) else block


def _declared_algorithm(block: Mapping[str, Any], stem: str) -> str | None:
    """The algorithm that a block names for a layer; None if it names none."""
    algorithm = _flat(block).get("quant_algo")
    if algorithm != MIXED_PRECISION:
        return None if algorithm is None else str(algorithm)
    layers = block.get("quantized_layers")
    entry = layers.get(stem) if isinstance(layers, Mapping) else None
    return str(entry.get("quant_algo")) if isinstance(entry, Mapping) else None


def _check_algorithm(stem: str, layer: StoredLayer, declared: str, block: Mapping[str, Any]) -> Iterator[Finding]:
    fmt = layer.format.innermost
    if ("NVFP4" in declared) != (fmt.encoding == NVFP4) or ("MXFP8" in declared) != (fmt.encoding == MXFP8):
        yield block_mismatch(stem, f"found {fmt.label}, but the config says {declared}", "vLLM-Omni, vLLM")
    elif fmt.encoding in (FP8, NVFP4) and not fmt.is_static and _needs_input_scale(block, declared):
        yield Finding(
            "error", "missing-companion", f"{stem}.input_scale", f"found none, expected it with {declared}",
            "vLLM-Omni, vLLM: only warn, and quantize inputs with an unset scale", "calibrate, with --calib",
        )  # fmt: skip


def _needs_input_scale(block: Mapping[str, Any], declared: str) -> bool:
    if declared == "FP8":
        return True
    groups = block.get("config_groups")
    if declared != "NVFP4" or not isinstance(groups, Mapping):
        return False
    return any(isinstance(group, Mapping) and group.get("input_activations") for group in groups.values())


def _algorithm(fmt: Format) -> str:
    if fmt.encoding == NVFP4:
        return "NVFP4" if fmt.is_static else "W4A16_NVFP4"
    if fmt.encoding == MXFP8:
        return MXFP8_ALONE
    return "FP8" if fmt.is_static else "FP8_PER_CHANNEL_PER_TOKEN"


MODELOPT_DIALECT = ModelOpt()
