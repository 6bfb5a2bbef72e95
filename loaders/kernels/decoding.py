"""Decodes quantized weights to bfloat16, fast enough not to hold up a GEMM on the result.

E4M3 codes are shifted: as a bfloat16 with the same sign, exponent and mantissa fields a code is too small by a power of
two, and one multiplication, which has to bring in the scale anyway, puts that right. So that scales below 2^33 do not
overflow on the way, such weights come out times 2^-32, which `weight_unit` undoes. E2M1 codes are shifted likewise and
given the exponent that they lack; a subnormal bfloat16 for 0.5 would cost time, and flushed to zero be wrong. Integers
of 4 bits are the last bits of 128 + code, from which 128 is subtracted with the zero point. Nothing is looked up in a
table of ours, which would be of one device, and of the mode that it was first used in; NF4 brings its own. Codes times
a power of two or an E4M3 scale are exact; float32 scales of blocks are rounded to bfloat16 first (an error of 2^-8 at
most, where that of E4M3 codes is 2^-4). W4A16 weights are exact products, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.encoding import PER_TENSOR
from omni_convert.formats.arithmetic.mx import COARSE_BLOCK, MX_BLOCK
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK
from omni_convert.formats.arithmetic.scratch import Scratch
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders.memory.layout import disk_tensors
from omni_convert.loaders.memory.packed_int4 import CODES, CODES_PER_WORD, SCALES, ZERO_POINTS, PackedInt4

__all__ = ["DECODERS", "Decoder", "Operands", "decode_rows", "padded_columns", "weight_unit"]

# Bias of bfloat16 less that of E4M3: what the shifted bits lack in the exponent.
E4M3_REBIAS = 127 - 7
HEADROOM = 32
E4M3_FIELDS = 0x87F0 - 0x10000  # of an int16: the sign, and 4 + 3 bits below four zeros
# Masks of an int32 with two bfloat16, the even element in the low half: signs, and 2 + 1 bits below six zeros.
E2M1_SIGNS, E2M1_MAGNITUDES = 0x80008000 - 0x100000000, 0x01C001C0
# In one bfloat16: the magnitude of code 1, and the bits of 0.5, its value.
E2M1_FIRST, HALF = 1 << 6, 126 << 7
NIBBLES, OFFSETS, OFFSET = 0x000F000F, 0x43004300, 128  # integers of 4 bits, and bfloat16 numbers whose last bit is one

_SCRATCH = Scratch()


def padded_columns(fmt: Format, columns: int) -> int:
    """Width of decoded rows: `columns` up to a whole block; the padding is zeros."""
    _, block = fmt.encoding.block if fmt.encoding is not None else PER_TENSOR
    return -(-columns // (block or 1)) * (block or 1)


def weight_unit(fmt: Format, tensors: Mapping[str, Tensor]) -> Tensor | float:
    """The factor that decoded weights still lack: a number, or float32 []."""
    decoder = DECODERS.get(type(fmt))
    unit = 1.0 if decoder is None else decoder.unit
    return tensors[unit].float().reshape(()) if isinstance(unit, str) else unit


def decode_rows(fmt: Format, tensors: Mapping[str, Tensor], start: int, columns: int, out: Tensor) -> None:
    """Rows of the weight that scaled inputs are multiplied by (`Format.multiplied`), over `weight_unit`.

    Args:
        fmt: any format
        tensors: of the layer, as in memory
        start: first row
        columns: in_features
        out: the result, contiguous bfloat16 [rows, padded_columns(fmt, columns)]
    """
    rows = slice(start, start + len(out))
    decoder = DECODERS.get(type(fmt))
    (decoder.decode if decoder is not None else _dequantize_rows)(fmt, tensors, rows, columns, out)


def _dequantize_rows(fmt: Format, tensors: Mapping[str, Tensor], rows: slice, columns: int, out: Tensor) -> None:
    multiple = fmt.row_multiple
    first = rows.start // multiple * multiple
    last = -(-rows.stop // multiple) * multiple
    tile = {}
    for suffix, layout in fmt.layout(len(tensors["weight"]), columns).items():
        is_of_rows = layout.rows_per_entry > 0
        tile[suffix] = tensors[suffix][layout.entries_of(first, last)] if is_of_rows else tensors[suffix]
    out[:, columns:] = 0
    out[:, :columns] = fmt.multiplied(disk_tensors(fmt, tile, columns))[rows.start - first : rows.stop - first]


def _decode_fp8(_fmt: Fp8, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor) -> None:
    _e4m3_bits(tensors["weight"][rows], out)
    out.mul_(2.0**E4M3_REBIAS)


def _decode_fp8_channel(
    _fmt: Fp8Channel, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor
) -> None:
    _e4m3_bits(tensors["weight"][rows], out)
    torch.mul(out, tensors["weight_scale"][rows, None].float() * 2.0 ** (E4M3_REBIAS - HEADROOM), out=out)


def _decode_fp8_block(fmt: Fp8Block, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor) -> None:
    height, width = fmt.block_size
    _e4m3_bits(tensors["weight"][rows], out)
    block_rows = torch.arange(rows.start, rows.stop, device=out.device) // height
    scale = tensors["weight_scale_inv"].float()[block_rows]
    _scale_(out, (scale * 2.0 ** (E4M3_REBIAS - HEADROOM)).bfloat16(), width)


def _decode_int8(_fmt: Int8, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor) -> None:
    torch.mul(tensors["weight"][rows], tensors["weight_scale"][rows].float(), out=out)


def _decode_mxfp8(_fmt: Mxfp8, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor) -> None:
    _e4m3_bits(tensors["weight"][rows], out)
    _scale_(out, _powers_of_two(tensors["weight_scale"][rows], E4M3_REBIAS - HEADROOM), MX_BLOCK)


def _decode_mxfp4(_fmt: Mxfp4, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor) -> None:
    _e2m1(tensors["weight"][rows], out)
    _scale_(out, _powers_of_two(tensors["weight_scale"][rows]), MX_BLOCK)


def _decode_mxfp4_dualscale(
    _fmt: Mxfp4DualScale, tensors: Mapping[str, Tensor], rows: slice, columns: int, out: Tensor
) -> None:
    coarse = tensors["weight_dual_scale"][rows].flatten(1).bfloat16()
    coarse = coarse.repeat_interleave(COARSE_BLOCK // MX_BLOCK, dim=1)[:, : columns // MX_BLOCK]
    _e2m1(tensors["weight"][rows], out)
    _scale_(out, _powers_of_two(tensors["weight_scale"][rows]) * coarse, MX_BLOCK)


def _decode_nvfp4(_fmt: Nvfp4, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor) -> None:
    codes = tensors["weight_scale"][rows]
    scale = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    _e4m3_bits(codes, scale)
    _e2m1(tensors["weight"][rows], out)
    _scale_(out, scale.mul_(2.0**E4M3_REBIAS), NVFP4_BLOCK)


def _decode_packed_int4(
    fmt: PackedInt4, tensors: Mapping[str, Tensor], rows: slice, _columns: int, out: Tensor
) -> None:
    words = _words(tensors[CODES][:, rows].t().contiguous().view(torch.uint8), out)
    words.mul_(1 | 1 << 12).bitwise_and_(NIBBLES).bitwise_or_(OFFSETS)
    groups = out.view(len(out), -1, fmt.group)
    groups.sub_(_zero_points(tensors[ZERO_POINTS], rows).add_(OFFSET)[..., None])
    torch.mul(groups, tensors[SCALES][:, rows].t().float().contiguous()[..., None], out=groups)


def _decode_nf4(fmt: Nf4, tensors: Mapping[str, Tensor], rows: slice, columns: int, out: Tensor) -> None:
    if columns % fmt.block:
        _dequantize_rows(fmt, tensors, rows, columns, out)
        return
    table = tensors["table"].bfloat16()
    pairs = torch.stack([table.repeat_interleave(len(table)), table.repeat(len(table))], dim=1).view(torch.int32)
    codes = tensors["weight"][rows].flatten().int()
    torch.index_select(pairs.flatten(), 0, codes, out=out.view(torch.int32).view(-1))
    first, last = (row * columns // fmt.block for row in (rows.start, rows.stop))
    blocks = torch.arange(first, last, device=out.device)
    numbers = out.view(-1, fmt.block)
    torch.mul(numbers, fmt.scales_of(tensors, blocks)[:, None], out=numbers)


def _zero_points(words: Tensor, rows: slice) -> Tensor:
    """Zero points of some rows, bfloat16 [rows, groups], of int32 [groups, out / 8]."""
    first = rows.start // CODES_PER_WORD
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (words[:, first : -(-rows.stop // CODES_PER_WORD), None] >> shifts).bitwise_and_(0xF).flatten(1)
    start = rows.start - first * CODES_PER_WORD
    return codes[:, start : start + rows.stop - rows.start].t().add(1).to(torch.bfloat16).contiguous()


def _e4m3_bits(codes: Tensor, out: Tensor) -> None:
    """E4M3 values times 2^-120: float8_e4m3fn [rows, K] to the left of bfloat16 [rows, padded]. NaN is no weight."""
    bits = out.view(torch.int16)
    columns = codes.shape[1]
    bits[:, columns:] = 0
    bits[:, :columns] = codes.view(torch.int8)  # brings the sign to the top
    bits.bitwise_left_shift_(4).bitwise_and_(E4M3_FIELDS)


def _e2m1(packed: Tensor, out: Tensor) -> None:
    """E2M1 values: uint8 [rows, K / 2], even elements in low nibbles, to the left of bfloat16 [rows, padded]."""
    words = _words(packed, out)
    memory = _SCRATCH.take(2 * words.numel(), torch.int32, out.device).view(2, *words.shape)
    # A product is a sum of shifted codes; those that would overlap are apart.
    torch.mul(words, 1 << 6 | 1 << 18, out=memory[0]).bitwise_and_(E2M1_MAGNITUDES)
    words.mul_(1 << 12 | 1 << 24).bitwise_and_(E2M1_SIGNS)
    magnitudes, is_not_zero = memory.view(torch.int16)
    torch.add(magnitudes, 512 - E2M1_FIRST, out=is_not_zero).bitwise_right_shift_(9)
    # 0.5 and 1, 1.5, 2 and so on are as far apart as codes, but for code 1, which has no mantissa.
    torch.threshold_(magnitudes, E2M1_FIRST, 0).add_(HALF).mul_(is_not_zero)
    words.bitwise_or_(memory[0])


def _words(packed: Tensor, out: Tensor) -> Tensor:
    """Bytes, uint8 [rows, K / 2], as int32 to the left of bfloat16 [rows, padded], whose bits are returned."""
    words = out.view(torch.int32)
    words[:, packed.shape[1] :] = 0
    words[:, : packed.shape[1]] = packed
    return words


def _powers_of_two(codes: Tensor, exponent: int = 0) -> Tensor:
    """2^(E8M0 exponent + `exponent`), bfloat16; saturates at 2^127, and below 2^-126 at zero."""
    field = codes.to(torch.int16).add_(exponent).clamp_(0, 254)
    return field.bitwise_left_shift_(7).view(torch.bfloat16)


def _scale_(values: Tensor, scale: Tensor, block: int) -> None:
    """Multiplies blocks along K, [rows, K], in place with their scales, [rows, K / block]."""
    # Spread first: torch does not vectorize an operation that repeats one operand every few elements.
    spread = _SCRATCH.take(values.numel(), values.dtype, values.device)
    values.mul_(spread.view(*scale.shape, block).copy_(scale[..., None]).view(values.shape))


@dataclass(frozen=True)
class Operands:
    """Suffixes of the tensors that the fused kernel takes, "" for none; see `triton/matmul.py`.

    Attributes:
        weight: codes
        block_scale: one byte for each block of columns
        group_scale: a number with more bits than bfloat16 has, for each group of rows or columns
        zero_points: of each group
        unit: one number for the whole weight or for each row
        is_turned: the group scales are [groups, rows]
    """

    weight: str = "weight"
    block_scale: str = ""
    group_scale: str = ""
    zero_points: str = ""
    unit: str = ""
    is_turned: bool = False


@dataclass(frozen=True)
class Decoder:
    """How kernels read a format faster than through `Format.dequantize`.

    Attributes:
        decode: fills bfloat16 rows: (format, tensors, rows, columns, out)
        unit: the number, or the suffix of the number, by which decoded weights are still to be multiplied
        operands: for the kernel that decodes inside the GEMM; None if it does not know the format
    """

    decode: Callable[..., None]
    unit: float | str
    operands: Operands | None


#: The formats with a decoder of their own. Any other is decoded by `Format.dequantize`.
DECODERS: dict[type[Format], Decoder] = {
    Fp8: Decoder(_decode_fp8, "weight_scale", Operands(unit="weight_scale")),
    Fp8Channel: Decoder(_decode_fp8_channel, 2.0**HEADROOM, Operands(unit="weight_scale")),
    Fp8Block: Decoder(_decode_fp8_block, 2.0**HEADROOM, Operands(group_scale="weight_scale_inv")),
    Int8: Decoder(_decode_int8, 1.0, Operands(unit="weight_scale")),
    Mxfp8: Decoder(_decode_mxfp8, 2.0**HEADROOM, Operands(block_scale="weight_scale")),
    Mxfp4: Decoder(_decode_mxfp4, 1.0, Operands(block_scale="weight_scale")),
    Mxfp4DualScale: Decoder(
        _decode_mxfp4_dualscale, 1.0, Operands(block_scale="weight_scale", group_scale="weight_dual_scale")
    ),
    Nvfp4: Decoder(_decode_nvfp4, "weight_scale_2", Operands(block_scale="weight_scale", unit="weight_scale_2")),
    PackedInt4: Decoder(
        _decode_packed_int4,
        1.0,
        Operands(weight=CODES, group_scale=SCALES, zero_points=ZERO_POINTS, is_turned=True),
    ),
    Nf4: Decoder(_decode_nf4, 1.0, None),
}
