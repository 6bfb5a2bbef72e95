"""Findings: what `verify` reports about a file, for tables and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CHECKS", "Finding", "Severity"]

#: `error`: a runtime fails or computes something else. `warning`: it works, but worse or differently than meant.
Severity = Literal["error", "warning"]

#: Every check, and what it looks for.
CHECKS = {
    "damaged-file": "files that cannot be read, or contradict their index",
    "changed-file": "files that are missing, or not the bytes that omni_convert.json records",
    "unreadable-layer": "tensors that make up no known format",
    "missing-tensor": "a tensor that the model as its config describes it has, and no file holds",
    "missing-companion": "codes without the scale (or other tensor) that gives them their meaning",
    "extra-companion": "scales that belong to no quantized weight, or that the format does not use",
    "wrong-dtype": "a tensor in another dtype than its dialect stores it in",
    "wrong-shape": "a tensor in another shape",
    "silent-cast": "a dtype that a runtime converts by value, without a word",
    "low-precision-scale": "scales stored in bf16 or fp16",
    "scale-order": "swizzled block scales where linear ones are due, or the other way round; or in no order at all",
    "exchanged-scales": "layers that have each other's scales, where a weight has so many that they show a pattern",
    "nibble-order": "packed codes with the even element in the wrong nibble (needs a reference)",
    "reciprocal-scale": "one over a scale instead of the scale",
    "implausible-scale": "weights or inputs of a size that no model has",
    "non-finite": "NaN or Inf",
    "non-positive-scale": "negative scales, or scales of 0 over codes that are not",
    "e8m0-nan": "the E8M0 byte 255",
    "off-grid": "numbers that FP4 does not have",
    "unused-range": "blocks whose largest element is far below the top of the grid",
    "indivisible-width": "a width that the format's blocks do not divide, where a runtime needs it",
    "inexact-smoothing": "a mul_scale that bfloat16, in which it is applied, changes",
    "fused-members-differ": "members of a merged layer that do not share what the runtime merges",
    "half-quantized-group": "members of a merged layer that are not all quantized, or not all in one format",
    "part-of-merged-layer": "members of a merged layer that the runtime takes merged alone",
    "half-ignored-group": "members of a merged layer of which only some are listed as ignored",
    "not-ignored": "a layer that is stored unquantized but not listed as ignored",
    "ignored-but-quantized": "a layer that is stored quantized and listed as ignored",
    "ignored-unmatched": "an ignored name that is no layer of the runtime",
    "not-built-quantized": "a quantized layer that the runtime builds unquantized",
    "misplaced-block": "a config block where a runtime hands it to other stages as well, or does not look for it",
    "unsupported-family": "a model that the runtime does not run quantized",
    "unknown-scope": "a model whose quantized layers in the runtime are not known here",
    "bad-block": "a config block that the runtime refuses",
    "unknown-key": "a key of the config block that the runtime does not know",
    "no-serialized-flag": "a block that makes the runtime quantize codes again",
    "unknown-method": "a quant_method that no reader here knows",
    "no-block": "a diffusers folder with quantized weights that config.json does not declare",
    "block-mismatch": "a config block that contradicts the tensors",
    "bad-mark": "a mark or label that contradicts the tensors, or has none",
    "no-architecture": "a GGUF file that does not say what model it is of",
    "wrong-architecture": "a GGUF file of another model than the config beside it, or of none that ComfyUI knows",
    "unknown-names": "tensors that are not those of the model that the config describes",
    "wrong-type": "blocks in a tensor that is no matrix, where runtimes expect numbers",
    "long-name": "a name that ggml cuts off",
    "unused-bytes": "bytes between or after tensors that belong to none",
    "differs-from-reference": "values further from the reference than the format explains",
    "not-in-reference": "a layer that the reference does not have in this shape",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: see `Severity`
        check: one of `CHECKS`
        layer: name of the layer or tensor; "" for the component as a whole
        what: what was found, and what was expected
        hurts: the runtimes that suffer, and how
        remedy: what to do about it
    """

    severity: Severity
    check: str
    layer: str
    what: str
    hurts: str
    remedy: str

    def __post_init__(self) -> None:
        assert self.check in CHECKS, self.check
