"""W4A16: codes and scales are what GPTQ's readers take, and searching scales never makes them worse."""

from __future__ import annotations

import pytest
import torch

from omni_convert.formats.dialects.codec import Transposed
from omni_convert.formats.dialects.packed_words import PackedColumns
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.int4 import Int4


def weight(rows: int = 64, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("group", [32, 64, 128])
def test_tensors_are_those_that_planning_promises(group: int) -> None:
    fmt = Int4(group)
    tensors = fmt.quantize(weight())
    layout = fmt.layout(64, 256)
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()} == {
        suffix: (entry.dtype, entry.shape) for suffix, entry in layout.items()
    }
    assert int(tensors["weight"].max()) <= 15
    assert tensors["weight_scale"].half().float().equal(tensors["weight_scale"])
    assert fmt.flaw(tensors) is None


def test_search_lowers_the_error() -> None:
    errors = [
        float((fmt.dequantize(fmt.quantize(weight())) - weight()).norm() / weight().norm())
        for fmt in (Int4(search=True), Int4(search=False))
    ]
    assert errors[0] < 0.96 * errors[1]


def test_zeros_stay_zeros() -> None:
    assert not Int4().dequantize(Int4().quantize(torch.zeros(8, 128))).any()


@pytest.mark.parametrize("shape", [(64, 200), (60, 256)])
def test_shapes_that_cannot_be_packed_are_refused(shape: tuple[int, int]) -> None:
    assert Int4().unsupported(*shape) is not None


@pytest.mark.parametrize("codec", [PackedColumns(4), PackedColumns(4, along_rows=True, offset=1), PackedColumns(8)])
def test_packing_is_undone_by_unpacking(codec: PackedColumns) -> None:
    codes = torch.randint(1, 16, (64, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    layout = TensorLayout(torch.uint8, (64, 40))
    packed = codec.encode(codes)
    assert tuple(packed.shape) == codec.stored(layout).shape
    assert codec.decode(packed, layout).equal(codes)


def test_a_turned_tensor_is_written_in_its_container() -> None:
    scales = torch.rand(64, 3).half().float()
    stored = Transposed(torch.float16).encode(scales)
    assert (stored.dtype, tuple(stored.shape)) == (torch.float16, (3, 64))
    assert Transposed(torch.float16).decode(stored, TensorLayout(torch.float32, (64, 3))).equal(scales)
