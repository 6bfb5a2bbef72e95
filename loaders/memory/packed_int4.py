"""W4A16 as it lies in files and in memory: AutoRound's packing, which is GPTQ's.

Tensors:    NAME.qweight  I32 [in / 8, out]           eight codes of consecutive columns a word, lowest bits first
            NAME.qzeros   I32 [in / group, out / 8]   zero points less one, of consecutive rows
            NAME.scales   F16 [in / group, out]
Arithmetic: W ≈ (code - zero point) * scale, a number that float32 holds exactly
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.auto_round import AUTO_ROUND
from omni_convert.formats.dialects.base import WrittenSpelling
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout, TensorRows, iterate_rows
from omni_convert.formats.schemes.int4 import PACKED_ROWS, Int4

__all__ = [
    "CODES",
    "CODES_PER_WORD",
    "SCALES",
    "ZERO_POINTS",
    "PackedInt4",
    "packed_layers",
]

#: Suffixes on disk.
CODES, SCALES, ZERO_POINTS = "qweight", "scales", "qzeros"
#: Columns that share a word of codes, and rows that share one of zero points.
CODES_PER_WORD = 8


@dataclass(frozen=True)
class PackedInt4(Int4):
    """W4A16 with the packed tensors of the file, where `Int4` has one code per byte."""

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return self._spelling(out_features, in_features).layout(super().layout(out_features, in_features))

    def quantize_rows(self, rows: Tensor, fitted: None) -> dict[str, Tensor]:
        return self._spelling(*rows.shape).encode(super().quantize_rows(rows, fitted))

    def quantize_fitted(self, weight: Tensor, fitted: None) -> dict[str, Tensor]:
        """The base class writes rows; here the rows of a tile are columns of the result."""
        rows, columns = weight.shape
        packed = {
            name: torch.empty(layout.shape, dtype=layout.dtype, device=weight.device)
            for name, layout in self.layout(rows, columns).items()
        }
        for start, tile in iterate_rows(TensorRows(weight), PACKED_ROWS):
            for name, words in self.quantize_rows(tile, fitted).items():
                first = start // (CODES_PER_WORD if name == ZERO_POINTS else 1)
                packed[name][:, first : first + words.shape[1]] = words
        return packed

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        words, rows = tensors[CODES].shape
        columns = words * CODES_PER_WORD
        spelling = self._spelling(rows, columns)
        canonical = {
            suffix: spelling.codec(suffix).decode(tensors[spelling.name(suffix)], layout)
            for suffix, layout in super().layout(rows, columns).items()
        }
        codes, zero_points = canonical["weight"].float(), canonical["weight_zero_point"]
        return (codes - zero_points.repeat_interleave(self.group, dim=1)) * self.element_scale(canonical)

    def _spelling(self, rows: int, columns: int) -> WrittenSpelling:
        spelling = AUTO_ROUND.spelling(self, (rows, columns))
        assert isinstance(spelling, WrittenSpelling), "AutoRound has this format"
        return spelling


def packed_layers(specs: Mapping[str, TensorSpec]) -> dict[str, Format]:
    """The format of every W4A16 layer of a checkpoint: state-dict stem to format, in checkpoint order."""
    formats: dict[str, Format] = {}
    for name, spec in specs.items():
        stem, _, leaf = name.rpartition(".")
        scales = specs.get(f"{stem}.{SCALES}")
        if leaf == CODES and len(spec.shape) == 2 and scales is not None and scales.shape and scales.shape[0]:
            formats[stem] = PackedInt4(spec.shape[0] * CODES_PER_WORD // scales.shape[0])
    return formats
