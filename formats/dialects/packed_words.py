"""Codecs of integers that are packed in bytes or int32 words: consecutive codes, lowest bits first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import unpack_nibbles
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import Found, LayerError
from omni_convert.formats.dialects.codec import Codec, WritableCodec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.rows import TensorLayout

__all__ = ["WORD_BITS", "InterleavedRows", "PackedColumns", "PackedRows", "SignedNibbles", "check_order"]

WORD_BITS = 32


@dataclass(frozen=True)
class PackedColumns(WritableCodec):
    """GPTQ's packing; rows of the weight are columns.

    Attributes:
        bits: of a code
        along_rows: a word holds codes of consecutive rows of the weight (`qzeros`), not of consecutive columns
            (`qweight`)
        offset: what is added to a code
        row_multiple: all rows of the weight, to write them
    """

    bits: int
    along_rows: bool = False
    offset: int = 0
    row_multiple: int = 1

    is_turned = True

    @property
    def on_disk(self) -> Codec:
        return replace(self, row_multiple=1)

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        per_word = 32 // self.bits
        shape = (columns, -(-rows // per_word)) if self.along_rows else (-(-columns // per_word), rows)
        return TensorLayout(torch.int32, shape)

    def encode(self, tensor: Tensor) -> Tensor:
        per_word = 32 // self.bits
        codes = tensor.to(torch.int32) - self.offset
        if self.along_rows and not _are_codes(codes, self.bits):
            low, high = self.offset, self.offset + (1 << self.bits) - 1
            found = f"{int(codes.min()) + low} to {int(codes.max()) + low}"
            raise CheckpointError(f"found zero points of {found}, expected {low} to {high}, which GPTQ's packing holds")
        words = codes if self.along_rows else codes.T  # packed along the first dimension
        words = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % per_word))
        words = words.reshape(-1, per_word, words.shape[1])
        packed = torch.zeros_like(words[:, 0])
        for place in range(per_word):
            packed |= words[:, place] << (place * self.bits)
        return packed.T.contiguous() if self.along_rows else packed.contiguous()

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=stored.device)
        if self.along_rows:
            codes = (stored[:, :, None] >> shifts).flatten(1).T  # [rows, columns]
        else:
            codes = (stored.T[:, :, None] >> shifts).flatten(1)[:, : layout.shape[1]]
        return ((codes & ((1 << self.bits) - 1)) + self.offset).to(layout.dtype).contiguous()

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        per_word = 32 // self.bits if self.along_rows else 1
        first = start // per_word
        words = checkpoint.read_columns(name, first, -(-stop // per_word))
        return self.decode(words, layout)[start - first * per_word : stop - first * per_word]


def _are_codes(codes: Tensor, bits: int) -> bool:
    return not codes.numel() or (int(codes.min()) >= 0 and int(codes.max()) < 1 << bits)


@dataclass(frozen=True)
class PackedRows(Codec):
    """Words of codes of a row, each offset to be positive; only read.

    Attributes:
        bits: of a code, a power of two
    """

    bits: int

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        return TensorLayout(torch.int32, (rows, -(-columns * self.bits // 32)))

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (stored[:, :, None] >> shifts).flatten(1)[:, : layout.shape[1]] & ((1 << self.bits) - 1)
        return (codes - (1 << (self.bits - 1))).to(layout.dtype)


@dataclass(frozen=True)
class InterleavedRows(Codec):
    """AWQ's packing: a word holds the 4-bit codes of eight rows of the weight, rows 0, 2, 4, 6 first; only read."""

    #: Place in a word of each of eight rows, lowest bits first.
    places = (0, 4, 1, 5, 2, 6, 3, 7)

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        return TensorLayout(torch.int32, (columns, -(-rows // len(self.places))))

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        shifts = 4 * torch.tensor(self.places, dtype=torch.int32)
        codes = (stored[:, :, None] >> shifts).flatten(1).T  # [rows, columns]
        return (codes & 0xF).to(layout.dtype).contiguous()

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        first, last = start // len(self.places), -(-stop // len(self.places))
        offset = first * len(self.places)
        return self.decode(checkpoint.read_columns(name, first, last), layout)[start - offset : stop - offset]


@dataclass(frozen=True)
class SignedNibbles(Codec):
    """Two 4-bit integers in two's complement a byte, the even element in the low nibble; only read."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        return TensorLayout(torch.int8, (rows, -(-columns // 2)))

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        is_of_bytes = spec.dtype is torch.uint8 and spec.shape == self.stored(layout).shape
        return None if is_of_bytes else super().mismatch(spec, layout)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        codes = unpack_nibbles(stored.view(torch.uint8)).to(torch.int8)[:, : layout.shape[1]]
        return ((codes ^ 8) - 8).to(layout.dtype)


def check_order(found: Found, stem: str, leaf: str, columns: int, group: int | None) -> None:
    """Refuses columns that are not in the order of their groups, as GPTQ leaves them with `desc_act`.

    Args:
        leaf: that of the tensor with each column's group
        group: columns of a group; None for all
    """
    numbers = found.checkpoint.read(f"{stem}.{leaf}")
    if not numbers.equal(torch.arange(columns, dtype=numbers.dtype) // (group or columns)):
        what = f"found reordered columns ({leaf}), expected groups of neighbours; export without reordering (desc_act)"
        raise LayerError(found, stem, f"layer '{stem}': {what}")
