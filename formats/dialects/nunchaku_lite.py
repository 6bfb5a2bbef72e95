"""How diffusers spells SVDQuant as `nunchaku_lite`, in the order of Nunchaku's kernels.

Tensors:  NAME.qweight        I8 [out, in / 2]     int4 in two's complement, or E2M1 codes; tiles of 128 x 64
          NAME.wscales        int4: BF16 [in / 64, out]; nvfp4: F8_E4M3 [in / 16, out]; tiles
          NAME.wcscales       BF16 [out], NAME.wtscale BF16 [1]; nvfp4 alone
          NAME.smooth_factor  BF16 [in], NAME.bias BF16 [out]; tiles of 16
          NAME.proj_down      BF16 [in, rank], NAME.proj_up BF16 [out, rank]; tiles of 16 x 16
Block:    {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", "svdq_w4a4": {"precision": "int4" or "nvfp4",
          "group_size": 64 or 16, "rank": 32, "targets": [names of layers]}}
Readers:  diffusers, which builds exactly these tensors for each target and takes no other
Limits:   one precision and one rank for all layers. A section `awq_w4a16` is neither read nor written.
Order:    That of Nunchaku's own files. Diffusers' kernels have the same signatures and shapes; that they read the same
          order was concluded, not run, so that files are only written with --force.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.checkpoint import Checkpoint
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
from omni_convert.formats.dialects.codec import Plain, WritableCodec
from omni_convert.formats.dialects.svdquant import SVDQUANT_NAMES, one_rank
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.svdquant import TILE, SvdQuant, SvdQuantInt4, SvdQuantNvfp4

__all__ = ["NUNCHAKU_LITE", "from_block"]

METHOD, SECTION = "nunchaku_lite", "svdq_w4a4"
FORMATS: dict[str, type[SvdQuant]] = {"int4": SvdQuantInt4, "nvfp4": SvdQuantNvfp4}
PRECISIONS = {kind.method: precision for precision, kind in FORMATS.items()}


@dataclass(frozen=True)
class _Tiles(WritableCodec):
    """Rows and columns in the order in which threads load them.

    Attributes:
        rows: sizes into which a tile's rows are cut, outermost first
        columns: the same of columns
        order: the axes of the stored tensor: 0 counts tiles of rows, then come its parts; next the count of tiles of
            columns and their parts
        dtype: on disk
        is_across: the stored shape is [columns, rows]
        row_multiple: rows that are encoded together
        word: dtype in which columns are moved, wider than the elements where some stay side by side
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    is_across: bool = False
    row_multiple: int = TILE
    word: torch.dtype | None = None

    @property
    def is_turned(self) -> bool:  # type: ignore[override]  # a class attribute elsewhere, here it follows the shape
        return self.is_across

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = _matrix(layout.shape)
        shape = (columns, rows) if self.is_across else (rows, columns)
        flat = shape if len(layout.shape) == 2 and columns > 1 else (rows,)
        return TensorLayout(self.dtype, flat, layout.rows_per_entry)

    def encode(self, tensor: Tensor) -> Tensor:
        stored = tensor.view(self.dtype) if self.dtype.itemsize == 1 else tensor.to(self.dtype)
        rows, columns = _matrix(tuple(stored.shape))
        words = stored.reshape(rows, columns)
        words = words.contiguous().view(self.word) if self.word is not None else words
        moved = words.reshape(*self._axes(words)).permute(self.order).contiguous().view(-1)
        return moved.view(self.dtype).view(self.stored(TensorLayout(self.dtype, tuple(tensor.shape))).shape)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        columns = _matrix(layout.shape)[1]
        flat = stored.contiguous().view(-1)
        rows = len(flat) // columns
        words = flat.view(self.word) if self.word is not None else flat
        axes = self._axes(words.view(rows, -1))
        inverse = sorted(range(len(self.order)), key=lambda axis: self.order[axis])
        moved = words.view([axes[axis] for axis in self.order]).permute(inverse).contiguous().view(-1).view(self.dtype)
        values = moved.view(layout.dtype) if layout.dtype.itemsize == 1 else moved.to(layout.dtype)
        return values.view(rows, *layout.shape[1:])

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        if not layout.rows_per_entry:
            return self.decode(checkpoint.read(name), layout)
        if self.is_across:
            return self.decode(checkpoint.read(name), layout)[start:stop]
        return super().read(checkpoint, name, layout, start, stop)

    def _axes(self, words: Tensor) -> list[int]:
        return [-1, *self.rows, words.shape[1] // math.prod(self.columns), *self.columns]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], 1) if len(shape) == 1 else (shape[0], shape[1])


# Eight warps take 16 of a tile's 128 rows each; a thread takes pairs of neighbours, and the pairs eight rows further.
WARP_ROWS = (8, 2, 4, 2)
VECTOR = _Tiles(WARP_ROWS, (), (0, 5, 1, 3, 2, 4), torch.bfloat16)


@dataclass(frozen=True)
class _Down(WritableCodec):
    """`lora_a` as the transpose of what `UP` stores of a matrix of its transposed shape."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return TensorLayout(torch.bfloat16, layout.shape[::-1], 0)

    def encode(self, tensor: Tensor) -> Tensor:
        rank, columns = tensor.shape
        parts = tensor.to(torch.bfloat16).view(rank // 16, 2, 8, columns // 16, 2, 4, 2)
        return parts.permute(3, 0, 2, 5, 1, 4, 6).reshape(columns, rank)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        rank, columns = layout.shape
        parts = stored.view(columns // 16, rank // 16, 8, 4, 2, 2, 2)
        return parts.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, columns).to(layout.dtype)


def _codecs(rows: int = TILE) -> dict[str, dict[str, WritableCodec]]:
    """The codecs by precision.

    Args:
        rows: all rows of the weight, to write it
    """
    common: dict[str, WritableCodec] = {
        # Words of eight codes; of the 16 rows of a warp a thread takes one, that eight on, and columns 32 on.
        "weight": _Tiles((8, 2, 8), (2, 4), (0, 4, 1, 3, 6, 2, 5), torch.int8, word=torch.int32),
        "smooth_factor": VECTOR,
        "lora_a": _Down(),
        "lora_b": _Tiles((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6), torch.bfloat16, row_multiple=16),
    }
    int4 = _Tiles(WARP_ROWS, (), (0, 5, 1, 3, 2, 4), torch.bfloat16, is_across=True, row_multiple=rows)
    nvfp4 = _Tiles((4, 4, 8), (4,), (0, 4, 3, 2, 1, 5), torch.float8_e4m3fn, is_across=True, row_multiple=rows)
    above = {"weight_scale_2": Plain(shape=(1,)), "channel_scale": VECTOR}
    return {"int4": {**common, "weight_scale": int4}, "nvfp4": {**common, "weight_scale": nvfp4, **above}}


class NunchakuLite(Dialect):
    """See the module."""

    name = "nunchaku-lite"
    consumers = "diffusers"
    runtimes = ("diffusers",)
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "does not know this quant_method; --dialect vllm-omni-svdquant holds nvfp4"),
        Verdict(DIFFUSERS, "loads", "with the package `kernels`, on CUDA but not on Hopper; nvfp4 on Blackwell"),
        Verdict(OURS, "loads", "decodes the weight; the branch runs beside it"),
        UNMARKED,
    )
    strict_runtimes = (OURS, DIFFUSERS)
    has_exact_shapes = True
    low_precision_parts = ("weight_scale", "weight_scale_2", "channel_scale", "smooth_factor", "lora_a", "lora_b")
    bias_codec = VECTOR
    unproven = (
        "its files are in the order of Nunchaku's kernels; that those of diffusers read the same order was not run, "
        "nor any value on them"
    )

    def recognises(self, found: Found) -> bool:
        return from_block(found.block) is not None

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        return (attempt(_layer, found, stem) for stem in found.stems("qweight"))

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if not isinstance(fmt, SvdQuant):
            return f"nunchaku_lite holds SVDQuant alone, found {fmt.label}"
        codecs = _codecs(shape[0])[PRECISIONS[fmt.method]]
        return fmt.unsupported(*shape) or WrittenSpelling(SVDQUANT_NAMES, codecs)

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block that diffusers reads.

        Raises:
            RecipeError: the layers have several precisions or ranks.
        """
        kinds = {fmt.method: fmt for fmt in layers.values()}
        if len(kinds) != 1:
            raise RecipeError(f"found layers of {' and '.join(sorted(kinds))}, expected one precision")
        ((method, fmt),) = kinds.items()
        assert isinstance(fmt, SvdQuant), "others have no spelling"
        section = {"precision": PRECISIONS[method], "group_size": fmt.group, "rank": one_rank(layers)}
        return {
            "quant_method": METHOD,
            "compute_dtype": "bfloat16",
            SECTION: {**section, "targets": sorted(layers)},
        }

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        return list(self.usual_verdicts)

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        return stem in _targets(block)

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        section = _section(found.block)
        for stem, layer in layers.items():
            fmt = layer.format
            if stem not in _targets(found.block):
                yield block_mismatch(
                    stem, "found it quantized, but not among the targets of the config", self.consumers
                )
            elif isinstance(fmt, SvdQuant) and (fmt.rank, fmt.group) != (
                section.get("rank"),
                section.get("group_size"),
            ):
                what = f"found {fmt.label}, groups of {fmt.group}, but the config says otherwise"
                yield block_mismatch(stem, what, self.consumers)


def _section(block: Mapping[str, Any]) -> Mapping[str, Any]:
    section = block.get(SECTION)
    return section if isinstance(section, Mapping) else {}


def _targets(block: Mapping[str, Any]) -> Collection[str]:
    targets = _section(block).get("targets")
    return targets if isinstance(targets, list) else ()


def from_block(block: Any) -> QuantizationConfig | None:
    """Reads a block of SVDQuant layers alone; None for any other block."""
    if not isinstance(block, Mapping) or block.get("quant_method") != METHOD or block.get("awq_w4a16"):
        return None
    kind = FORMATS.get(str(_section(block).get("precision")))
    return None if kind is None else QuantizationConfig(kind.method)


def _layer(found: Found, stem: str) -> StoredLayer:
    weight, down = found.checkpoint[f"{stem}.qweight"], found.get(stem, "proj_down")
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
    return StoredLayer(stem, fmt, shape, Spelling(SVDQUANT_NAMES, _codecs()[precision]))


NUNCHAKU_LITE = NunchakuLite()
