"""How vLLM-Omni spells SVDQuant: NVFP4 and a branch of low rank, in the natural order of rows and columns.

Tensors:  NAME.qweight        I8 [out, in / 2]          two E2M1 codes a byte, even k in the low nibble
          NAME.wscales        F8_E4M3 [in / 16, out]
          NAME.wcscales       BF16 [out], NAME.wtscale BF16 [1]; ones may be left out
          NAME.smooth_factor  BF16 [in]
          NAME.proj_down      BF16 [in, rank], NAME.proj_up BF16 [out, rank]
Block:    {"quant_method": "svdquant", "rank": 32, "precision": "nvfp4", "modules_to_not_convert": [...]}
Readers:  leave a layer alone if any name of `modules_to_not_convert` is *part* of its own. The loaders of 0.30.0 and
          0.32.0rc1 raise on the wtscale of a part of a layer that they merge (`default_weight_loader`), and on a layer
          without one (`_check_unloaded_weights`). So such layers are merged here, under the names that they have there.
Limits:   nvfp4 alone, on SM 10.3. Some loaders take no merged layers, since they look for a part's name anywhere in a
          tensor's: those of FLUX.1 (`to_qkv`), and of Z-Image for `w13`. These layers must stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from omni_convert.formats.config import QuantizationConfig
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
from omni_convert.formats.dialects.block_findings import block_mismatch
from omni_convert.formats.dialects.codec import Plain, Transposed, WritableCodec
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.errors import RecipeError, listed
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.original_names import OriginalTensor, parts_of
from omni_convert.formats.families.table import FAMILIES
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.svdquant import DEFAULT_RANK, SvdQuantNvfp4

__all__ = ["SVDQUANT", "SVDQUANT_NAMES", "cast_scales", "from_block", "one_rank"]

#: Canonical suffix to the suffix on disk, which Nunchaku's files and vLLM-Omni's have in common.
SVDQUANT_NAMES = {
    "weight": "qweight",
    "weight_scale": "wscales",
    "weight_scale_2": "wtscale",
    "channel_scale": "wcscales",
    "lora_a": "proj_down",
    "lora_b": "proj_up",
}
METHOD = "svdquant"
SKIPPED = "modules_to_not_convert"
OPTIONAL = ("channel_scale", "weight_scale_2")


def _codecs(rows: int = 1) -> dict[str, WritableCodec]:
    """The codecs.

    Args:
        rows: all rows of the weight, to write it
    """
    return {
        "weight": Plain(torch.int8),
        "weight_scale": Transposed(row_multiple=rows),
        "weight_scale_2": Plain(torch.bfloat16, (1,)),
        "channel_scale": Plain(shape=(-1,)),
        "lora_a": Transposed(),
    }


#: What vLLM-Omni does with SVDQuant in other dialects.
NVFP4_ELSEWHERE = Verdict(
    VLLM_OMNI, "refuses", "does not know this quant_method; --dialect vllm-omni-svdquant holds nvfp4"
)
#: What our loader does with SVDQuant in any dialect.
DECODED = Verdict(OURS, "loads", "decodes the weight; the branch runs beside it")


class SvdQuant(Dialect):
    """See the module."""

    name = "vllm-omni-svdquant"
    consumers = "vLLM-Omni"
    usual_verdicts = (
        Verdict(VLLM_OMNI, "loads", "on SM 10.3 alone; its kernel has not run a file of ours"),
        Verdict(DIFFUSERS, "loads", "after `import omni_convert.loaders`; else it does not know the quant_method"),
        DECODED,
        UNMARKED,
    )
    strict_runtimes = (OURS, VLLM_OMNI, DIFFUSERS)  # in which our loader reads it
    fills_vllm_omni_parameters = True
    takes_parts = False
    names_expected = "others"
    lists_built_layers = True
    has_exact_shapes = True
    low_precision_parts = ("weight_scale_2", "channel_scale", "smooth_factor", "lora_a", "lora_b")

    def recognises(self, found: Found) -> bool:
        return found.quant_method == METHOD and "precision" in found.block

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        return (attempt(_layer, found, stem) for stem in found.stems("qweight"))

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if not isinstance(fmt, SvdQuantNvfp4):
            return f"vLLM-Omni reads SVDQuant in nvfp4 alone, found {fmt.label}"
        return fmt.unsupported(*shape) or WrittenSpelling(SVDQUANT_NAMES, _codecs(shape[0]))

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block of layers of one rank.

        Raises:
            RecipeError: they have several; or the name of a kept layer is part of that of a quantized one.
        """
        skipped = sorted({*ignored})
        covered = next(((stem, name) for stem in layers for name in skipped if name in stem), None)
        if covered is not None:
            raise RecipeError(
                f"'{covered[0]}': found it quantized and '{covered[1]}' not, expected both or neither: vLLM-Omni "
                "leaves each layer alone whose name contains that of a skipped one"
            )
        return {"quant_method": METHOD, "rank": one_rank(layers), "precision": "nvfp4", SKIPPED: skipped}

    def ignored_entries(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        entries = block.get(SKIPPED)
        return tuple(map(str, entries)) if isinstance(entries, list) else ()

    def is_ignored(self, name: str, entries: Collection[str]) -> bool:
        return any(entry in name for entry in entries)

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        found = list(self.usual_verdicts)
        if component.refusal:
            found[0] = Verdict(VLLM_OMNI, "refuses", component.refusal)
        return found

    def tensors_of(self, family: Family, specs: Mapping[str, TensorSpec]) -> dict[str, OriginalTensor] | None:
        return family.merged_tensors(specs)

    def are_names_of_readers(self, family: Family, names: Collection[str]) -> bool:
        return any(parts_of(family.merged_names, name) for name in names)

    def model_stems(self, stem: str) -> tuple[str, ...]:
        return next(filter(None, (parts_of(family.merged_names, stem) for family in FAMILIES)), (stem,))

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        rank = found.block.get("rank", DEFAULT_RANK)
        for stem, layer in layers.items():
            if isinstance(layer.format, SvdQuantNvfp4) and layer.format.rank != rank:
                what = f"found rank {layer.format.rank}, but the config says {str(rank)[:20]}"
                yield block_mismatch(stem, what, self.consumers)
        yield from cast_scales(found, layers, self.consumers)


def cast_scales(found: Found, stems: Iterable[str], consumers: str) -> Iterator[Finding]:
    """Reports scales of whole weights in F32, of readers that keep them in BF16."""
    for stem in stems:
        spec = found.get(stem, SVDQUANT_NAMES["weight_scale_2"])
        if spec is not None and spec.dtype is torch.float32:
            yield Finding(
                "warning", "silent-cast", spec.name, "found F32, expected BF16", f"{consumers}: up to 0.4 % off",
                "store a number that BF16 holds",
            )  # fmt: skip


def one_rank(layers: Mapping[str, Format]) -> int:
    """The rank that all layers have.

    Raises:
        RecipeError: they have several.
    """
    ranks = sorted({getattr(fmt, "rank", 0) for fmt in layers.values()})
    if len(ranks) != 1:
        raise RecipeError(f"found branches of rank {listed([*map(str, ranks)], 3)}, expected one rank")
    return int(ranks[0])


def from_block(block: Any) -> QuantizationConfig | None:
    """Reads a block of vLLM-Omni's SVDQuant; None for any other block."""
    is_ours = isinstance(block, Mapping) and block.get("quant_method") == METHOD and block.get("precision") == "nvfp4"
    return QuantizationConfig(SvdQuantNvfp4.method, ignored_layers=SVDQUANT.ignored_entries(block)) if is_ours else None


def _layer(found: Found, stem: str) -> StoredLayer:
    if found.block.get("precision") != "nvfp4":
        what = f"found precision {str(found.block.get('precision'))[:20]!r} in the config block, expected nvfp4"
        raise LayerError(found, stem, f"layer '{stem}': {what}")
    weight, down = found.checkpoint[f"{stem}.qweight"], found.get(stem, "proj_down")
    if down is None or len(down.shape) != 2 or len(weight.shape) != 2:
        what = f"tensor '{stem}.proj_down' is missing or no matrix, expected the branch beside qweight"
        raise LayerError(found, stem, what, "missing-companion")
    shape = (weight.shape[0], 2 * weight.shape[1])
    ones = tuple(suffix for suffix in OPTIONAL if found.get(stem, SVDQUANT_NAMES[suffix]) is None)
    return StoredLayer(stem, SvdQuantNvfp4(down.shape[1]), shape, Spelling(SVDQUANT_NAMES, _codecs()), ones=ones)


SVDQUANT = SvdQuant()
