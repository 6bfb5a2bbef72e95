"""How diffusers spells SVDQuant as `nunchaku_lite`, in the order of Nunchaku's kernels.

Tensors:  NAME.qweight        I8 [out, in / 2]     int4 in two's complement, or E2M1 codes; tiles of 128 x 64
          NAME.wscales        int4: BF16 [in / 64, out]; nvfp4: F8_E4M3 [in / 16, out]; tiles
          NAME.wcscales       BF16 [out], NAME.wtscale BF16 [1]; nvfp4 alone
          NAME.smooth_factor  BF16 [in], NAME.bias BF16 [out]; tiles of 16
          NAME.proj_down      BF16 [in, rank], NAME.proj_up BF16 [out, rank]; tiles of 16 x 16
          AWQ W4A16: NAME.qweight I32 [out / 4, in / 2], NAME.wscales and NAME.wzeros BF16 [in / 64, out], NAME.bias
Block:    {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", "svdq_w4a4": {"precision": "int4" or "nvfp4",
          "group_size": 64 or 16, "rank": 32, "targets": [names of layers]}, "awq_w4a16": {"precision": "int4",
          "group_size": 64, "targets": [...]}}, the last only where there are such layers
Readers:  diffusers, which builds exactly these tensors for each target and takes no other
Limits:   one precision and one rank for all layers. AWQ layers are optional, so that -m keep alone writes them.
Order:    That of Nunchaku's own files. Diffusers' kernels have the same signatures and shapes; that they read the same
          order was concluded, not run, so that files are only written with --force.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from omni_convert.formats.config import QuantizationConfig
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
from omni_convert.formats.dialects.block_findings import block_mismatch
from omni_convert.formats.dialects.nunchaku_order import (
    FORMATS,
    PRECISIONS,
    VECTOR,
    awq_layer,
    modulation,
    svdquant_codecs,
)
from omni_convert.formats.dialects.svdquant import (
    DECODED,
    NVFP4_ELSEWHERE,
    SVDQUANT_NAMES,
    cast_scales,
    one_rank,
)
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, UNMARKED, Verdict
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.awq import AWQ_GROUP, AwqInt4
from omni_convert.formats.schemes.svdquant import SvdQuant

__all__ = ["NUNCHAKU_LITE", "from_block"]

METHOD, SECTION, AWQ_SECTION = "nunchaku_lite", "svdq_w4a4", "awq_w4a16"


class NunchakuLite(Dialect):
    """See the module."""

    name = "nunchaku-lite"
    consumers = "diffusers"
    runtimes = ("diffusers",)
    usual_verdicts = (
        NVFP4_ELSEWHERE,
        Verdict(DIFFUSERS, "loads", "with the package `kernels`, on CUDA but not on Hopper; nvfp4 on Blackwell"),
        DECODED,
        UNMARKED,
    )
    strict_runtimes = (OURS, DIFFUSERS)
    has_exact_shapes = True
    low_precision_parts = ("weight_scale", "weight_scale_2", "channel_scale", "smooth_factor", "lora_a", "lora_b")
    unproven = (
        "its files are in the order of Nunchaku's kernels; that those of diffusers read the same order was not run, "
        "nor any value on them"
    )

    def recognises(self, found: Found) -> bool:
        return from_block(found.block) is not None

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        return (attempt(_layer, found, stem) for stem in found.stems("qweight"))

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if isinstance(fmt, AwqInt4):
            return fmt.unsupported(*shape) or modulation(1, shape[0])
        if not isinstance(fmt, SvdQuant):
            return f"nunchaku_lite holds SVDQuant alone, found {fmt.label}"
        codecs = svdquant_codecs(shape[0])[PRECISIONS[fmt.method]]
        return fmt.unsupported(*shape) or WrittenSpelling(SVDQUANT_NAMES, codecs, bias=VECTOR)

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block that diffusers reads.

        Raises:
            RecipeError: the layers have several precisions or ranks.
        """
        branched = {stem: fmt for stem, fmt in layers.items() if isinstance(fmt, SvdQuant)}
        kinds = {fmt.method: fmt for fmt in branched.values()}
        if len(kinds) != 1:
            raise RecipeError(f"found layers of {' and '.join(sorted(kinds))}, expected one precision")
        ((method, fmt),) = kinds.items()
        section = {"precision": PRECISIONS[method], "group_size": fmt.group, "rank": one_rank(branched)}
        others = sorted(layers.keys() - branched.keys())
        awq = {AWQ_SECTION: {"precision": "int4", "group_size": AWQ_GROUP, "targets": others}} if others else {}
        common = {"quant_method": METHOD, "compute_dtype": "bfloat16"}
        return {**common, SECTION: {**section, "targets": sorted(branched)}, **awq}

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        return list(self.usual_verdicts)

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        return stem in _targets(block) or stem in _targets(block, AWQ_SECTION)

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        section = _section(found.block)
        for stem, layer in layers.items():
            fmt = layer.format
            if not self.declares_quantized(found.block, stem):
                yield block_mismatch(
                    stem, "found it quantized, but not among the targets of the config", self.consumers
                )
            elif isinstance(fmt, SvdQuant) and (fmt.rank, fmt.group) != (
                section.get("rank"),
                section.get("group_size"),
            ):
                what = f"found {fmt.label}, groups of {fmt.group}, but the config says otherwise"
                yield block_mismatch(stem, what, self.consumers)
        yield from cast_scales(found, layers, self.consumers)


def _section(block: Mapping[str, Any], name: str = SECTION) -> Mapping[str, Any]:
    section = block.get(name)
    return section if isinstance(section, Mapping) else {}


def _targets(block: Mapping[str, Any], name: str = SECTION) -> Collection[str]:
    targets = _section(block, name).get("targets")
    return targets if isinstance(targets, list) else ()


def from_block(block: Any) -> QuantizationConfig | None:
    """Reads a block with layers of SVDQuant; None for any other block."""
    if not isinstance(block, Mapping) or block.get("quant_method") != METHOD:
        return None
    kind = FORMATS.get(str(_section(block).get("precision")))
    return None if kind is None else QuantizationConfig(kind.method)


def _layer(found: Found, stem: str) -> StoredLayer:
    weight, down = found.checkpoint[f"{stem}.qweight"], found.get(stem, "proj_down")
    if stem in _targets(found.block, AWQ_SECTION):
        return awq_layer(found, stem, 1)
    precision = str(_section(found.block)["precision"])
    if weight.dtype is not torch.int8:
        raise LayerError(found, stem, f"layer '{stem}': found qweight in {weight.dtype}, expected int8")
    if down is None or len(down.shape) != 2 or len(weight.shape) != 2:
        what = f"tensor '{stem}.proj_down' is missing or no matrix, expected the branch beside qweight"
        raise LayerError(found, stem, what, "missing-companion")
    shape, fmt = (weight.shape[0], 2 * weight.shape[1]), FORMATS[precision](down.shape[1])
    problem = fmt.unsupported(*shape)
    if problem is not None:
        raise LayerError(found, stem, f"layer '{stem}': {problem}")
    return StoredLayer(stem, fmt, shape, Spelling(SVDQUANT_NAMES, svdquant_codecs()[precision], bias=VECTOR))


NUNCHAKU_LITE = NunchakuLite()
