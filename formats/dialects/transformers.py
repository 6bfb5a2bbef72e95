"""How transformers and DeepSeek spell FP8 in blocks, and transformers MXFP8; text encoders come so.

Tensors:  NAME.weight            F8_E4M3 [out, in]
          NAME.weight_scale_inv  F32 or F8_E8M0 [ceil(out / N), ceil(in / K)], or one number; it multiplies
          NAME.activation_scale  F32 [], if activations are static
          MXFP8                  the same with F8_E8M0 or U8 [out, in / 32]
Block:    {"quant_method": "fp8", "activation_scheme": ..., "weight_block_size": [128, 128],
          "modules_to_not_convert": [...]}, without vLLM-Omni's flag; MXFP8 has "weight_block_size": [1, 32],
          "scale_fmt": "ue8m0", and may say "mxfp8"
Limits:   written are FP8 in blocks and MXFP8 with dynamic activations. Without a GPU for FP8, transformers 5.23 derives
          the sizes of blocks from the number of scales (`Fp8Dequantize`), so that a last block that is cut short gives
          other weights there: such layers are not written.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.dialects.base import Dialect, Found, LayerError, StoredLayer, WrittenSpelling
from omni_convert.formats.dialects.block_findings import block_mismatch, unknown_keys
from omni_convert.formats.dialects.codec import Plain
from omni_convert.formats.dialects.detection import signed_layers
from omni_convert.formats.dialects.verdict import (
    CONVERT_FIRST,
    KEEP,
    UNKNOWN_METHOD,
    UNMARKED,
    VLLM_OMNI,
    Verdict,
)
from omni_convert.formats.dialects.vllm_omni import missing_flag
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import fp8_block_size
from omni_convert.formats.schemes.mxfp8 import MXFP8

__all__ = ["TRANSFORMERS"]

KNOWN_KEYS = (
    "quant_method", "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers",
    "modules_to_convert", "dequantize", "fmt", "scale_fmt", "expert_dtype",
)  # fmt: skip
# `scale_fmt` of scales that are powers of two.
BYTE_SCALES = "ue8m0"
NAMES = {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}


def _block_size(fmt: Format) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as the config block declares them; None for other formats."""
    return (1, MX_BLOCK) if fmt.encoding == MXFP8 else fp8_block_size(fmt)


def _cut_short(fmt: Format, shape: tuple[int, int]) -> str | None:
    """Why transformers would read a weight in other blocks than the config block declares, or None."""
    sizes = _block_size(fmt)
    if sizes is None or all(length <= size or length % size == 0 for length, size in zip(shape, sizes, strict=True)):
        return None
    return (
        f"found a weight of {list(shape)} in blocks of {list(sizes)}, the last cut short; without a GPU for FP8, "
        "transformers takes as many blocks of equal size"
    )


class Transformers(Dialect):
    """See the module."""

    name = "transformers"
    consumers = "transformers"
    has_low_precision_scales = True
    looks_up_model_names = True
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "unknown keys, or without its flag quantized online", KEEP),
        UNKNOWN_METHOD,
        Verdict("transformers", "loads", "on a GPU with FP8; elsewhere as dequantized BF16"),
        CONVERT_FIRST,
        UNMARKED,
    )

    def recognises(self, found: Found) -> bool:
        if found.quant_method == "mxfp8":
            return _has_inverse_scales(found)
        return found.quant_method == "fp8" and "is_checkpoint_fp8_serialized" not in found.block

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        # Without inverse scales these are vLLM's files, which leave the flag out.
        return signed_layers(found, NAMES if _has_inverse_scales(found) else None)

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if _block_size(fmt) is None:
            return "transformers' fp8 is FP8 in blocks, --weight-block-size, or MXFP8"
        if (reason := _cut_short(fmt, shape)) is not None:
            return reason
        if fmt.encoding == MXFP8:
            return WrittenSpelling(NAMES, {"weight_scale": Plain(torch.float8_e8m0fnu)})
        return WrittenSpelling()

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block that `FineGrainedFP8Config` reads.

        Raises:
            RecipeError: the layers have blocks of several sizes, which one block cannot express.
        """
        sizes = {sizes for fmt in layers.values() if (sizes := _block_size(fmt)) is not None}
        if len(sizes) > 1:
            raise RecipeError(f"found blocks of {sorted(sizes)}, expected one size; transformers knows one for all")
        block: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": list(sizes.pop()),
            "modules_to_not_convert": sorted(ignored),
        }
        if any(fmt.encoding == MXFP8 for fmt in layers.values()):
            block["scale_fmt"] = BYTE_SCALES
        return block

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        lists = (block.get("modules_to_not_convert"), block.get("ignored_layers"))
        entries = [entry for listed in lists if isinstance(listed, list) for entry in listed if isinstance(entry, str)]
        is_head = stem.rpartition(".")[2] == "lm_head"  # stays without being listed
        return not is_head and not any(_matches(stem, entry) for entry in entries)

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        if not _has_inverse_scales(found):
            yield missing_flag(found.quant_method)
        yield from unknown_keys(found.block, KNOWN_KEYS, self.name, is_fatal=False)
        for stem, layer in layers.items():
            yield from _check_blocks(stem, layer, found.block)


def _matches(stem: str, entry: str) -> bool:
    """Whether an entry of `modules_to_not_convert` means a layer: by its name's end, a part of it, or as a pattern."""
    try:
        is_pattern = re.match(entry, stem) is not None
    except re.error:
        is_pattern = False
    return is_pattern or stem.endswith(entry) or f".{entry}." in f".{stem}."


def _check_blocks(stem: str, layer: StoredLayer, block: Mapping[str, Any]) -> Iterator[Finding]:
    """The blocks and scales of a layer against the config block, and against what transformers can run."""
    sizes, declared, scale_format = _block_size(layer.format), block.get("weight_block_size"), block.get("scale_fmt")
    if sizes is not None and isinstance(declared, list) and tuple(declared) != sizes:
        what = f"found blocks of {list(sizes)}, but the config says {declared}"
        yield block_mismatch(stem, what, "transformers")
    if layer.format.encoding == MXFP8 and scale_format != BYTE_SCALES:
        what = f"found scales that are powers of two, but the config says scale_fmt {str(scale_format)[:40]}"
        yield block_mismatch(stem, what, "transformers, on a GPU")
    if (reason := _cut_short(layer.format, layer.shape)) is not None:
        yield Finding(
            "warning", "indivisible-width", stem, reason, "transformers without a GPU for FP8: wrong or refused",
            "leave the layer unquantized, or use a GPU",
        )  # fmt: skip


def _has_inverse_scales(found: Found) -> bool:
    return next(iter(found.stems("weight_scale_inv")), None) is not None


TRANSFORMERS = Transformers()
