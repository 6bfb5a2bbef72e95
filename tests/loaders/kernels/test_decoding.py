"""Weights are decoded to bfloat16 exactly where it holds them, and within the rounding of their scales elsewhere."""

import pytest
import torch

from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.schemes.gguf import Gguf
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.decode_mm import DECODE_MM
from omni_convert.loaders.kernels.decoding import DECODERS, decode_rows, padded_columns, weight_unit
from omni_convert.loaders.kernels.reference import REFERENCE
from omni_convert.loaders.memory.layout import disk_tensors, memory_tensors, weight_shape
from omni_convert.loaders.memory.packed_int4 import PackedInt4

FORMATS = (
    Fp8(),
    Fp8Channel(),
    Fp8Block((16, 48)),
    Int8(),
    Mxfp8(),
    Mxfp4(),
    Mxfp4DualScale(),
    Nvfp4(),
    PackedInt4(32),
    Nf4(),
)
WIDTHS = [1, 16, 33, 640]
CASES = [(fmt, width) for fmt in FORMATS for width in WIDTHS if fmt.unsupported(24, width) is None]


def decode(fmt: Format, tensors: dict[str, torch.Tensor], columns: int) -> torch.Tensor:
    """float32 [out, padded], in two parts that do not start at a block of rows."""
    rows, _ = weight_shape(tensors)
    out = torch.full((rows, padded_columns(fmt, columns)), torch.nan, dtype=torch.bfloat16)
    decode_rows(fmt, tensors, 0, columns, out[: rows // 3])
    decode_rows(fmt, tensors, rows // 3, columns, out[rows // 3 :])
    return out.float() * weight_unit(fmt, tensors)


@pytest.mark.parametrize(("fmt", "columns"), CASES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 0.02, 3e4])
def test_rows_are_what_dequantizing_gives(fmt, columns, magnitude):
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(0)) * magnitude
    tensors = fmt.quantize(weight)
    expected = fmt.dequantize(tensors)
    decoded = decode(fmt, memory_tensors(fmt, tensors), columns)
    assert not decoded[:, columns:].any()
    decoded = decoded[:, :columns]
    if isinstance(fmt, Fp8 | Mxfp8 | Mxfp4):
        assert torch.equal(decoded, expected)
    elif isinstance(fmt, PackedInt4):
        assert torch.equal(decoded, expected.bfloat16().float())
    elif isinstance(fmt, Nvfp4):  # the same numbers, multiplied in another order
        assert torch.allclose(decoded, expected, rtol=2**-22, atol=0)
    else:
        assert torch.allclose(decoded, expected, rtol=2**-7, atol=0)


def test_every_e4m3_code_is_exact_subnormals_and_zeros_included():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(1, -1).view(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.tensor(1.0)}
    assert torch.equal(decode(Fp8(), tensors, codes.shape[1]), codes.float())


@pytest.mark.parametrize("exponent", [-60, -9, 0, 7, 33])
def test_every_e4m3_code_is_exact_under_scales_far_from_one(exponent):
    codes = torch.arange(127, dtype=torch.uint8).view(1, -1).view(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.full((1, 4), 127 + exponent, dtype=torch.uint8)}
    assert torch.equal(decode(Mxfp8(), tensors, 127)[:, :127], codes.float() * 2.0**exponent)


def test_every_pair_of_e2m1_codes_is_exact_in_its_place():
    packed = torch.arange(256, dtype=torch.uint8).repeat(1, 2)
    tensors = {"weight": packed, "weight_scale": torch.full((1, 32), 130, dtype=torch.uint8)}
    expected = disk_tensors(Mxfp4(), tensors, 1024)["weight"].float() * 8
    assert torch.equal(decode(Mxfp4(), tensors, 1024), expected)


def test_every_format_that_can_be_loaded_can_be_decoded():
    assert {type(fmt) for fmt in FORMATS} == set(DECODERS)


def test_a_format_without_a_decoder_is_decoded_by_its_own_dequantization():
    fmt = Gguf("Q8_0")
    assert type(fmt) not in DECODERS
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    tensors = fmt.quantize(weight)
    assert torch.equal(decode(fmt, tensors, 64), fmt.dequantize(tensors).bfloat16().float())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = REFERENCE.run(x, tensors, fmt, None).float()
    assert (DECODE_MM.run(x, tensors, fmt, None).float() - expected).norm() <= 2**-8 * expected.norm()
