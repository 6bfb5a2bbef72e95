"""NF4: 4-bit codes that name entries of a table, as bitsandbytes stores them; FP4 is the same with another table.

Tensors:    NAME.weight         U8 [out, in / 2]          two codes a byte, even k in the high nibble
            NAME.table          F32 [16]
            NAME.weight_scale   F32 [blocks]              one for each 64 numbers of the flattened weight
  or nested NAME.absmax         U8 [blocks]               codes of these scales
            NAME.absmax_scale   F32 [ceil(blocks / 256)]
            NAME.absmax_table   F32 [256]
            NAME.absmax_offset  F32 []                    mean of the scales
Arithmetic: W ≈ table[code] * scale; nested: scale = absmax_table[absmax] * absmax_scale + absmax_offset
Consumers:  diffusers and transformers with bitsandbytes, on a GPU
Limits:     in % 64 == 0 to be written: bitsandbytes reads blocks that cross rows on a GPU, and misreads them on a CPU
Scales:     amax as bitsandbytes has it; with search the one of a few below it with the least squared error, refitted
            to its codes. Nested ones are rounded before the codes are chosen, which bitsandbytes does the other way
            round: without search, codes are its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.search import LevelTable, best_attempt
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import ElementFormat, Format
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows, iterate_rows

__all__ = ["DEFAULT_BLOCK", "NESTED_BLOCK", "Codebook", "Nf4"]

#: Numbers that share a scale, as bitsandbytes has it unless it is told otherwise.
DEFAULT_BLOCK = 64
#: Scales of absmax that share one of their own.
NESTED_BLOCK = 256
TABLE_ENTRIES = 16
# Quantiles of the normal distribution, scaled to 1 on both sides (Dettmers et al., arXiv 2305.14314).
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Scales to try, in units of the largest magnitude: the smaller ones clip a few numbers.
FACTORS = (1.0, 0.95, 0.9, 0.85)
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Codebook(Format):
    """Codes that name entries of a table, with a scale for each block of the flattened weight.

    Attributes:
        method: the name that users know: nf4, fp4
        block: elements that share a scale
        row_multiple: rows that hold a whole number of blocks, and of blocks of scales if these are nested
        nested: the scales are quantized themselves
        dtype: of the weight that readers restore, as the file calls it
    """

    method: str
    block: int = DEFAULT_BLOCK
    row_multiple: int = 1
    nested: bool = False
    dtype: str = "bfloat16"

    elements_per_entry = 2
    is_named_by_dialect = True

    @property
    def encoding(self) -> Encoding:
        return Encoding(IntegerType(4), block=(1, self.block))

    @property
    def activation_scheme(self) -> str:
        return "none"

    @property
    def label(self) -> str:
        return f"{self.method} block {self.block}" + (", nested" if self.nested else "")

    @property
    def together(self) -> int:
        """Elements that are encoded together."""
        return self.block * (NESTED_BLOCK if self.nested else 1)

    def for_columns(self, columns: int) -> Codebook:
        return replace(self, row_multiple=self.together // math.gcd(columns, self.together))

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        blocks = -(-out_features * in_features // self.block)
        layout = {
            "weight": TensorLayout(torch.uint8, (out_features, in_features // 2)),
            "table": TensorLayout(torch.float32, (TABLE_ENTRIES,), 0),
        }
        if not self.nested:
            return layout | {"weight_scale": self._flat(torch.float32, blocks, self.block, in_features)}
        return layout | {
            "absmax": self._flat(torch.uint8, blocks, self.block, in_features),
            "absmax_scale": self._flat(torch.float32, -(-blocks // NESTED_BLOCK), self.together, in_features),
            "absmax_table": TensorLayout(torch.float32, (NESTED_BLOCK,), 0),
            "absmax_offset": TensorLayout(torch.float32, (), 0),
        }

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors["weight"]
        elements = tensors["table"][torch.stack([codes >> 4, codes & 0xF], dim=-1).flatten(1).int()]
        return (elements.view(-1, self.block) * self.block_scales(tensors)[:, None]).view(elements.shape)

    def block_scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scale of each block, float32 [blocks]."""
        codes = tensors["absmax" if self.nested else "weight_scale"]
        return self.scales_of(tensors, torch.arange(len(codes), device=codes.device))

    def scales_of(self, tensors: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
        """The scales of the blocks with these numbers, float32 [blocks]."""
        if not self.nested:
            return tensors["weight_scale"][blocks].float()
        values = tensors["absmax_table"][tensors["absmax"][blocks].int()]
        return values * tensors["absmax_scale"][blocks // NESTED_BLOCK] + tensors["absmax_offset"]

    def _flat(self, dtype: torch.dtype, count: int, elements: int, columns: int) -> TensorLayout:
        rows = elements // math.gcd(columns, elements)
        return TensorLayout(dtype, (count,), rows, rows * columns // elements)


@dataclass(frozen=True)
class Nf4(Codebook, ElementFormat):
    """NF4; the module describes it.

    Attributes:
        search: choose scales by error
    """

    method: str = "nf4"
    search: bool = True

    is_weight_only = True
    activation_schemes = ("none",)
    options = ("double_quant",)

    @classmethod
    def build(cls, options: FormatOptions) -> Nf4:
        return cls(nested=options.double_quant, search=options.search)

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> None:
        """Returns None: the dialect bitsandbytes knows the format by names and JSON."""

    def for_weight(self, shape: tuple[int, ...]) -> Nf4:
        fmt = self.for_columns(math.prod(shape[1:]))
        assert isinstance(fmt, Nf4), "it stays what it is"
        return fmt

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if in_features % 2 or out_features * in_features % self.block:
            found = f"{out_features} x {in_features}"
            return f"nf4 needs in_features % 2 == 0 and a whole number of blocks of {self.block} numbers, found {found}"
        return None

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> float:
        """The mean of the scales, if these are quantized themselves."""
        if not self.nested:
            return 0.0
        total, blocks = 0.0, 0
        for weight in weights:
            for _, rows in iterate_rows(weight, self.row_multiple):
                amax = _amax(rows.float().view(-1, self.block))
                total, blocks = total + float(amax.sum(dtype=torch.float64)), blocks + len(amax)
        return total / blocks

    def constants(self, fitted: float) -> dict[str, Tensor]:
        table = {"table": torch.tensor(NF4_TABLE)}
        if not self.nested:
            return table
        return table | {"absmax_table": dynamic_map(), "absmax_offset": torch.tensor(fitted)}

    def quantize_rows(self, rows: Tensor, fitted: float) -> dict[str, Tensor]:
        blocks = rows.float().reshape(-1, self.block)
        scale = _amax(blocks)
        table = _table_on(rows.device)
        if self.search:
            scale = _search(blocks, scale, table)
        stored = self._stored_scales(scale, fitted)
        if self.search:
            constants = {name: tensor.to(rows.device) for name, tensor in self.constants(fitted).items()}
            scale = self.block_scales({**stored, **constants})
        codes = table.codes(blocks / _divisor(scale)[:, None]).view(rows.shape)
        return {"weight": _packed(codes), **stored}

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = _divisor(self.block_scales(tensors))
        return scale.repeat_interleave(self.block).view(len(tensors["weight"]), -1)

    def round_elements(self, values: Tensor) -> Tensor:
        return _table_on(values.device).nearest(values)

    def with_elements(self, tensors: Mapping[str, Tensor], elements: Tensor) -> dict[str, Tensor]:
        return {**tensors, "weight": _packed(_table_on(elements.device).codes(elements))}

    def _stored_scales(self, scale: Tensor, offset: float) -> dict[str, Tensor]:
        """The tensors of these scales, float32 [blocks]."""
        if not self.nested:
            return {"weight_scale": scale}
        centred = scale - offset
        padded = torch.nn.functional.pad(centred, (0, -len(scale) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        spread = padded.abs().amax(dim=1).clamp_(min=SMALLEST_SCALE)
        codes = _nearest(padded / spread[:, None], dynamic_map().to(scale.device)).flatten()[: len(scale)]
        return {"absmax": codes, "absmax_scale": spread}


def dynamic_map() -> Tensor:
    """The table of bitsandbytes for quantized scales, float32 [256], ascending.

    It has 2^i numbers of each sign in the decade that ends at 10^(i - 6), for i from 0 to 6: the middles of intervals
    of equal width; and 0 and 1.
    """
    decades = (torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float64) for power in range(7))
    middles = torch.cat([(bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (i - 6) for i, bounds in enumerate(decades)])
    return torch.cat([-middles, middles, torch.tensor([0.0, 1.0])]).float().sort().values


def _amax(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block, float32 [blocks], above zero."""
    return blocks.abs().amax(dim=1).clamp_(min=SMALLEST_SCALE)


def _divisor(scale: Tensor) -> Tensor:
    """The scales, with a small number in place of zeros that nesting has left."""
    return torch.where(scale == 0, SMALLEST_SCALE, scale)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Codes of the nearest entries, uint8 of the same shape; of two that are as near the lower one."""
    return torch.bucketize(values, _middles(table), out_int32=True).to(torch.uint8)


def _middles(table: Tensor) -> Tensor:
    return (table[1:] + table[:-1]) / 2


def _packed(codes: Tensor) -> Tensor:
    """Two codes a byte, uint8 [rows, in / 2] of uint8 [rows, in]."""
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def _table_on(device: torch.device) -> LevelTable:
    """NF4's table; codes are its entries' places."""
    table = torch.tensor(NF4_TABLE)
    return LevelTable.of(table, _middles(table), device)


def _search(blocks: Tensor, amax: Tensor, table: LevelTable) -> Tensor:
    """The scale of each block with the smallest squared error found, float32 [blocks]."""
    best = best_attempt(_attempt(blocks, amax * factor, table) for factor in FACTORS)
    scale = best[1]
    elements = table.nearly_nearest(blocks / scale[:, None])
    refitted = (blocks * elements).sum(dim=1) / elements.square().sum(dim=1)
    return best_attempt([best, _attempt(blocks, torch.where(refitted > 0, refitted, scale), table)])[1]


def _attempt(blocks: Tensor, scale: Tensor, table: LevelTable) -> tuple[Tensor, Tensor]:
    """The squared error of each block with a scale, and the scale; both float32 [blocks]."""
    elements = table.nearly_nearest(blocks / scale[:, None])
    return elements.mul_(scale[:, None]).sub_(blocks).square_().sum(dim=1), scale
