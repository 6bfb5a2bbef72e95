"""The contract that every format keeps: what planning promises is what quantizing delivers, tile by tile.

GGUF's types and those of SVDQuant, which need wider rows, have it in files of their own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e8m0 import E8M0_NAN
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.rows import TensorRows
from omni_convert.formats.schemes.convrot_w4a4 import ConvrotW4A4
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Channel, Fp8E5m2
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.formats.schemes.int8 import Int8, RotatedInt8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.schemes.rotated_grid import W4a8, W6a8
from omni_convert.formats.table import FORMATS as METHODS

FORMATS: dict[str, QuantizingFormat] = {
    "fp8": Fp8(),
    "fp8-rows": Fp8Channel(),
    "fp8-e5m2": Fp8E5m2(),
    "int8": Int8(),
    "int8-shared": Int8(shared_in_group=True),
    "int8-rotated": RotatedInt8(),
    "mxfp8": Mxfp8(),
    "mxfp8-plain": Mxfp8(search=False),
    "mxfp8-msmodelslim": Mxfp8("msmodelslim"),
    "mxfp4": Mxfp4(),
    "mxfp4-plain": Mxfp4(search=False),
    "mxfp4-smooth": Mxfp4(smooth=True),
    "mxfp4-ceil_x": Mxfp4("msmodelslim_ceil_x"),
    "dualscale": Mxfp4DualScale(),
    "dualscale-plain": Mxfp4DualScale(search=False),
    "dualscale-msmodelslim": Mxfp4DualScale("msmodelslim"),
    "nvfp4": Nvfp4(),
    "nvfp4-plain": Nvfp4(search=False),
    "w4a16": Int4(32),
    "convrot_w4a4": ConvrotW4A4(),
    "convrot_w4a4-plain": ConvrotW4A4(search=False),
    "w4a8": W4a8(),
    "w4a8-plain": W4a8(search=False),
    "w6a8": W6a8(),
    "nf4": Nf4(),
    "nf4-plain": Nf4(search=False),
    "nf4-nested": Nf4(nested=True),
}
# Levels without a zero among them, of which the smallest scale makes a number near it.
NEARLY_ZERO = ("w4a8",)
# Methods whose steps depend on what was computed, which the meta device does not know.
LOOK_AT_NUMBERS = ("w4a8", "w6a8", "mxfp4_dualscale")
ELSEWHERE = ("gguf", "svdquant_int4", "svdquant_nvfp4", "fp8_storage")
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_every_method_is_here() -> None:
    assert {fmt.method for fmt in FORMATS.values()} | {*ELSEWHERE} == METHODS.keys()


@every_format
@pytest.mark.parametrize("columns", [64, 512, 576, 1088])
def test_quantizing_delivers_the_layout(fmt: QuantizingFormat, columns: int) -> None:
    fmt = fmt.for_weight((8, columns))
    layout = fmt.layout(8, columns)
    assert fmt.unsupported(8, columns) is None
    tensors = fmt.quantize(normal(8, columns).bfloat16())
    assert tensors.keys() == layout.keys()
    for suffix, tensor in tensors.items():
        assert tensor.dtype is layout[suffix].dtype, suffix
        assert tuple(tensor.shape) == layout[suffix].shape, suffix
        assert tensor.is_contiguous(), suffix
    assert fmt.flaw(tensors) is None


@every_format
def test_rows_do_not_depend_on_the_tiling(fmt: QuantizingFormat) -> None:
    weight = normal(300, 1024).bfloat16()
    fmt = fmt.for_weight((300, 1024))
    fitted = fmt.fit([TensorRows(weight)], None)
    whole = fmt.quantize_rows(weight, fitted)
    step = 7 * fmt.row_multiple
    parts = [fmt.quantize_rows(weight[start : start + step], fitted) for start in range(0, 300, step)]
    for suffix, tensor in whole.items():
        joined = torch.cat([part[suffix] for part in parts])
        assert torch.equal(tensor.view(torch.uint8), joined.view(torch.uint8)), suffix


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].method not in LOOK_AT_NUMBERS])
def test_tensors_are_where_the_weight_is(name: str) -> None:
    """Torch mixes no numbers of the meta device with those of a CPU, as it would mix none with those of a GPU."""
    fmt = FORMATS[name].for_weight((16, 512))
    fitted = fmt.fit([TensorRows(normal(16, 512))], None)
    tensors = fmt.quantize_rows(torch.empty(16, 512, dtype=torch.bfloat16, device="meta"), fitted)
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


@every_format
def test_the_weight_is_left_alone(fmt: QuantizingFormat) -> None:
    weight = normal(8, 128)
    before = weight.clone()
    fmt.for_weight((8, 128)).quantize(weight)
    assert torch.equal(weight, before)


@every_format
def test_a_weight_comes_back_within_the_bound_of_the_format(fmt: QuantizingFormat) -> None:
    weight, fmt = normal(64, 1024), fmt.for_weight((64, 1024))
    rest = fmt.dequantize(fmt.quantize(weight)) - weight
    assert float(rest.norm() / weight.norm()) < fmt.largest_error


@every_format
def test_zero_weights_give_finite_scales_and_zeros(fmt: QuantizingFormat) -> None:
    weight = torch.zeros(4, 1024, dtype=torch.bfloat16)
    weight[0, 40] = 1.0  # one block of one row alone is not zero
    fmt = fmt.for_weight((4, 1024))
    tensors = fmt.quantize(weight)
    restored = fmt.dequantize(tensors)
    assert float(restored[1:].abs().max()) <= (1e-6 if fmt.method in NEARLY_ZERO else 0)
    assert restored[0, 40] == pytest.approx(1.0, rel=0.15)
    for suffix, tensor in tensors.items():
        if tensor.dtype is not torch.uint8:
            assert bool(torch.isfinite(tensor.float()).all()), suffix
    if "weight_scale" in tensors and tensors["weight_scale"].dtype is torch.uint8:
        assert not bool((tensors["weight_scale"] == E8M0_NAN).any())


@every_format
def test_subnormal_weights_give_numbers(fmt: QuantizingFormat) -> None:
    """Or the scale is told to be impossible, as one of FP8 that float32 does not have."""
    weight, fmt = normal(4, 512) * 2.0**-145, fmt.for_weight((4, 512))
    tensors = fmt.quantize(weight)
    assert bool(torch.isfinite(fmt.dequantize(tensors)).all()) or fmt.flaw(tensors) is not None


@every_format
def test_a_nan_is_not_hidden(fmt: QuantizingFormat) -> None:
    weight, fmt = normal(2, 512), fmt.for_weight((2, 512))
    weight[1, 3] = torch.nan
    restored = fmt.dequantize(fmt.quantize(weight))
    assert bool(restored[1].isnan().any())
