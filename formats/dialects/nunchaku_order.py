"""The order of numbers that Nunchaku's kernels load, which two dialects have in common.

Weights, scales and branches lie as the threads of a kernel take them: in tiles, each in parts whose order is data here.
Modulations have words of their own; see `ModulationWords`. The rows of the chunks into which a model cuts what they
give (shifts, scales, gates) alternate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import pack_nibbles, unpack_nibbles
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.base import Found, LayerError, StoredLayer, WrittenSpelling
from omni_convert.formats.dialects.codec import Plain, WritableCodec
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.awq import AWQ_GROUP, AWQ_ROWS, AwqInt4
from omni_convert.formats.schemes.svdquant import TILE, SvdQuant, SvdQuantInt4, SvdQuantNvfp4

__all__ = [
    "FORMATS",
    "PRECISIONS",
    "VECTOR",
    "InterleavedRows",
    "ModulationWords",
    "awq_codecs",
    "awq_layer",
    "modulation",
    "svdquant_codecs",
]

#: Precision, as Nunchaku names it, to the format.
FORMATS: dict[str, type[SvdQuant]] = {"int4": SvdQuantInt4, "nvfp4": SvdQuantNvfp4}
#: Canonical suffix to the suffix on disk of AWQ layers.
AWQ_NAMES = {"weight": "qweight", "weight_scale": "wscales", "weight_zero_point": "wzeros"}
# Chunks of a modulation with shifts, scales and gates.
FEWEST_CHUNKS = 3
#: Method to precision.
PRECISIONS = {kind.method: precision for precision, kind in FORMATS.items()}


@dataclass(frozen=True)
class Tiles(WritableCodec):
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
VECTOR = Tiles(WARP_ROWS, (), (0, 5, 1, 3, 2, 4), torch.bfloat16)


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


def svdquant_codecs(rows: int = TILE) -> dict[str, dict[str, WritableCodec]]:
    """The codecs by precision.

    Args:
        rows: all rows of the weight, to write it
    """
    common: dict[str, WritableCodec] = {
        # Words of eight codes; of the 16 rows of a warp a thread takes one, that eight on, and columns 32 on.
        "weight": Tiles((8, 2, 8), (2, 4), (0, 4, 1, 3, 6, 2, 5), torch.int8, word=torch.int32),
        "smooth_factor": VECTOR,
        "lora_a": _Down(),
        "lora_b": Tiles((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6), torch.bfloat16, row_multiple=16),
    }
    int4 = Tiles(WARP_ROWS, (), (0, 5, 1, 3, 2, 4), torch.bfloat16, is_across=True, row_multiple=rows)
    nvfp4 = Tiles((4, 4, 8), (4,), (0, 4, 3, 2, 1, 5), torch.float8_e4m3fn, is_across=True, row_multiple=rows)
    above = {"weight_scale_2": Plain(torch.bfloat16, (1,)), "channel_scale": VECTOR}
    return {"int4": {**common, "weight_scale": int4}, "nvfp4": {**common, "weight_scale": nvfp4, **above}}


@dataclass(frozen=True)
class _Interleaved(WritableCodec):
    """What AWQ layers have in common: rows in chunks that alternate, of a weight that is encoded as a whole.

    Attributes:
        chunks: into which the rows are cut; the first rows of all chunks come first
        row_multiple: all rows of the weight, to write them
    """

    chunks: int = 1
    row_multiple: int = 1

    is_turned = True

    @property
    def on_disk(self) -> WritableCodec:
        return replace(self, row_multiple=1)

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        return self.decode(checkpoint.read(name), layout)[start:stop]

    def _alternating(self, rows: Tensor) -> Tensor:
        return rows.view(self.chunks, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    def _in_chunks(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.chunks, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


@dataclass(frozen=True)
class InterleavedRows(_Interleaved):
    """A vector, or the rows of a matrix as columns, in BF16."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return TensorLayout(torch.bfloat16, layout.shape[::-1], layout.rows_per_entry)

    def encode(self, tensor: Tensor) -> Tensor:
        rows = self._alternating(tensor).to(torch.bfloat16)
        return rows.T.contiguous() if rows.dim() == 2 else rows

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        rows = stored.T if stored.dim() == 2 else stored
        return self._in_chunks(rows.contiguous()).to(layout.dtype)


@dataclass(frozen=True)
class ScalesAboutOne(InterleavedRows):
    """The bias of a modulation whose scales are about 1 on disk, and about 0 in the model.

    What is added costs bits: a bias returns to 2^-8 of one.
    """

    def encode(self, tensor: Tensor) -> Tensor:
        return super().encode(tensor.float() + self._ones(tensor))

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        bias = super().decode(stored.float(), replace(layout, dtype=torch.float32))
        return (bias - self._ones(bias)).to(layout.dtype)

    def loss(self, tensor: Tensor) -> str | None:
        layout = TensorLayout(tensor.dtype, tuple(tensor.shape), 0)
        return None if self.decode(self.encode(tensor), layout).equal(tensor) else "BF16 holds 1 more to 2^-8 alone"

    def _ones(self, bias: Tensor) -> Tensor:
        """One for each row of the chunks of scales, the second and the second to last, else zero, float32 [out]."""
        ones = torch.zeros(self.chunks, len(bias) // self.chunks, device=bias.device)
        ones[1] = ones[-2] = 1
        return ones.flatten()


@dataclass(frozen=True)
class ModulationWords(_Interleaved):
    """Codes of 4 bits, I32 [out / 4, in / 2]: of four rows, 64 columns each in turn.

    A half word holds the codes of columns k, k + 8, k + 16 and k + 24; eight of them 32 columns.
    """

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        return TensorLayout(torch.int32, (rows // AWQ_ROWS, columns // 2), layout.rows_per_entry)

    def encode(self, tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        parts = self._alternating(tensor).view(rows // AWQ_ROWS, AWQ_ROWS, columns // AWQ_GROUP, 2, 4, 8)
        codes = parts.permute(0, 2, 1, 3, 5, 4).contiguous()
        return pack_nibbles(codes.view(-1, 4)).flatten().view(torch.int32).view(rows // AWQ_ROWS, columns // 2)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        rows, columns = stored.shape[0] * AWQ_ROWS, stored.shape[1] * 2
        codes = unpack_nibbles(stored.contiguous().view(torch.uint8).view(-1, 2))
        parts = codes.view(rows // AWQ_ROWS, columns // AWQ_GROUP, AWQ_ROWS, 2, 8, 4)
        return self._in_chunks(parts.permute(0, 2, 1, 3, 5, 4).reshape(rows, columns))


def awq_codecs(chunks: int, rows: int = 1) -> dict[str, WritableCodec]:
    """The codecs of a layer in AWQ W4A16.

    Args:
        chunks: into which its model cuts what it gives, if readers expect their rows to alternate; else 1
        rows: all rows of the weight, to write it
    """
    numbers = InterleavedRows(chunks, rows)
    return {"weight": ModulationWords(chunks, rows), "weight_scale": numbers, "weight_zero_point": numbers}


def modulation(chunks: int, rows: int = 1, *, is_about_one: bool = False) -> WrittenSpelling:
    """How a layer in AWQ W4A16 lies on disk.

    Args:
        chunks, rows: as for `awq_codecs`
        is_about_one: the bias of scales is about 1; see `ScalesAboutOne`
    """
    bias = ScalesAboutOne(chunks) if is_about_one else InterleavedRows(chunks) if chunks > 1 else None
    return WrittenSpelling(AWQ_NAMES, awq_codecs(chunks, rows), bias=bias)


def awq_layer(found: Found, stem: str, chunks: int | None = None, *, is_about_one: bool = False) -> StoredLayer:
    """A layer in AWQ W4A16.

    Args:
        chunks: as for `awq_codecs`; None for as many as the weight has rows for each column
        is_about_one: as for `modulation`

    Raises:
        LayerError: its weight is none.
    """
    weight = found.checkpoint[f"{stem}.qweight"]
    if len(weight.shape) != 2 or weight.dtype is not torch.int32:
        what = f"found qweight of {weight.dtype} {list(weight.shape)}, expected int32 words in a matrix"
        raise LayerError(found, stem, f"layer '{stem}': {what}".replace("torch.", ""))
    rows, columns = AWQ_ROWS * weight.shape[0], 2 * weight.shape[1]
    problem = AwqInt4().unsupported(rows, columns)
    if problem is None and chunks is None and rows % columns:
        problem = f"found a modulation of {rows} x {columns}, expected rows in multiples of columns"
    if problem is None and is_about_one and rows // columns < FEWEST_CHUNKS:
        problem = f"found a modulation of {rows} x {columns}, expected shifts, scales and gates"
    if problem is not None:
        raise LayerError(found, stem, f"layer '{stem}': {problem}")
    spelling = modulation(chunks or rows // columns, is_about_one=is_about_one)
    return StoredLayer(stem, AwqInt4(), (rows, columns), spelling)
