"""AWQ's integers, as AutoAWQ and transformers store them; only read. AutoRound has the same packing under its own name.

Tensors:  NAME.qweight  I32 [in, out / 8]             4-bit codes of eight rows of the weight a word
          NAME.qzeros   I32 [in / group, out / 8]     zero points, packed likewise
          NAME.scales   F16 [in / group, out]         W = (code - zero point) * scale
Block:    {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": true, "version": "gemm",
          "modules_to_not_convert": [...]}
Limits:   version "gemm" only; "gemv" and others are packed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from omni_convert.formats.dialects.base import Dialect, Found, LayerError, Spelling, StoredLayer, attempt
from omni_convert.formats.dialects.codec import Transposed
from omni_convert.formats.dialects.packed_words import WORD_BITS, InterleavedRows
from omni_convert.formats.dialects.verdict import REQUANTIZE, UNKNOWN_METHOD, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.schemes.foreign import Scaled

__all__ = ["AWQ", "INTEGER_NAMES", "awq_layer"]

INTEGER_NAMES = {"weight": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}
BITS = 4
VERSION = "gemm"


class Awq(Dialect):
    """See the module."""

    name = "awq"
    consumers = "vLLM, transformers"
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "cannot build AWQ from a block of a diffusion model", "omni-convert -m METHOD"),
        UNKNOWN_METHOD,
        Verdict("vLLM, transformers", "loads", "language models, on a GPU"),
        REQUANTIZE,
        UNMARKED,
    )

    def recognises(self, found: Found) -> bool:
        return found.quant_method == "awq"

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        return (attempt(awq_layer, found, stem) for stem in found.stems("qweight"))

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        listed = block.get("modules_to_not_convert")
        entries = listed if isinstance(listed, list) else []
        is_head = stem.rpartition(".")[2] == "lm_head"  # stays without being listed
        return not is_head and not any(isinstance(entry, str) and entry in stem for entry in entries)


def awq_layer(found: Found, stem: str) -> StoredLayer:
    """A layer in AWQ's packing.

    Raises:
        LayerError: its bits or its packing are others, or its tensors do not belong together.
    """
    where = f"layer '{stem}'"
    bits, version = found.block.get("bits", found.block.get("w_bit", BITS)), found.block.get("version", VERSION)
    if bits != BITS or str(version).lower() != VERSION:
        what = f"found {bits!r:.20} bits of AWQ's version {version!r:.20}, expected 4 bits of 'gemm'"
        raise LayerError(found, stem, f"{where}: {what}")
    words, scales = found.checkpoint[f"{stem}.qweight"], found.get(stem, "scales")
    if len(words.shape) != 2 or scales is None or len(scales.shape) != 2 or not scales.shape[0]:
        what = "found qweight without scales [in / group, out], expected both"
        raise LayerError(found, stem, f"{where}: {what}", "missing-companion")
    columns, rows = words.shape[0], words.shape[1] * (WORD_BITS // BITS)
    group = None if scales.shape[0] == 1 else -(-columns // scales.shape[0])
    codecs = {"weight": InterleavedRows(), "weight_scale": Transposed(), "weight_zero_point": InterleavedRows()}
    fmt = Scaled("int4", torch.uint8, group, has_zero_point=True, symmetric=found.block.get("sym") is True)
    return StoredLayer(stem, fmt, (rows, columns), Spelling(INTEGER_NAMES, codecs))


AWQ = Awq()
