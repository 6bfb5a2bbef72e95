from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from omni_convert.formats.errors import RecipeError
from omni_convert.formats.options import FormatChoices
from omni_convert.formats.rows import TensorRows
from omni_convert.formats.schemes.fp8 import E4M3_MAX, Fp8, Fp8Block, Fp8Channel, Fp8E5m2, round_to_e4m3
from omni_convert.formats.table import FORMATS, build_format


def test_rounding_saturates_instead_of_overflowing() -> None:
    values = torch.tensor([1e9, -1e9, float("inf"), 448.0, 460.0])
    assert round_to_e4m3(values).float().tolist() == [448.0, -448.0, 448.0, 448.0, 448.0]


def test_a_fused_group_shares_the_scale_of_its_largest_member() -> None:
    small, large = torch.full((4, 8), 0.5), torch.full((4, 8), -7.0)
    fitted = Fp8().fit([TensorRows(small), TensorRows(large)], None)
    assert Fp8().constants(fitted)["weight_scale"].item() == pytest.approx(7.0 / E4M3_MAX)


@pytest.mark.parametrize("fmt", [Fp8(), Fp8E5m2(), Fp8Channel(), Fp8Block((128, 128)), Fp8Block((16, 64))])
def test_a_zero_weight_keeps_finite_positive_scales(fmt: Fp8 | Fp8E5m2 | Fp8Channel | Fp8Block) -> None:
    tensors = fmt.quantize(torch.zeros(40, 200))
    scale = tensors.get("weight_scale", tensors.get("weight_scale_inv"))
    assert scale is not None
    assert torch.equal(scale, torch.ones_like(scale))
    assert not fmt.dequantize(tensors).any()


def test_an_outlier_spoils_only_its_own_block() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.01
    weight[0, 0] = 1e5
    error = (Fp8Block((128, 128)).dequantize(Fp8Block((128, 128)).quantize(weight)) - weight)[128:, 128:]
    assert error.norm() / weight[128:, 128:].norm() < 0.03
    per_tensor = (Fp8().dequantize(Fp8().quantize(weight)) - weight)[128:, 128:]
    assert per_tensor.norm() / weight[128:, 128:].norm() > 0.5


@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (128, 128), (7, 300)])
def test_blocks_that_do_not_divide_the_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fmt = Fp8Block((128, 128))
    tensors = fmt.quantize(weight)
    assert {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()} == {
        suffix: layout.shape for suffix, layout in fmt.layout(*shape).items()
    }
    torch.testing.assert_close(fmt.dequantize(tensors), weight, rtol=2**-4, atol=1e-2)


def test_an_outlier_spoils_only_its_own_row() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.01
    weight[0, 0] = 1e5
    tensors = Fp8Channel().quantize(weight)
    assert torch.equal(tensors["weight_scale"], weight.abs().amax(1) / E4M3_MAX)
    assert tensors["weight"].float().abs().amax(1).tolist() == [E4M3_MAX] * 64
    error = (Fp8Channel().dequantize(tensors) - weight)[1:]
    assert error.norm() / weight[1:].norm() < 0.03


def test_e5m2_fills_its_own_grid_and_rounds_half_to_even() -> None:
    weight = torch.tensor([[57344.0, 1.125, 1.375, -1.625, 0.0]])
    tensors = build_format("fp8", element="e5m2").quantize(weight)
    assert tensors["weight"].dtype is torch.float8_e5m2
    assert tensors["weight_scale"].item() == 1.0
    assert tensors["weight"].float().tolist() == [[57344.0, 1.0, 1.5, -1.5, 0.0]]


def test_e5m2_in_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^--element e5m2: found with --weight-block-size"):
        build_format("fp8", element="e5m2", weight_block_size=(128, 128))


def test_options_that_formats_name_are_declared() -> None:
    declared = {choice.name for choice in fields(FormatChoices)}
    of_recipe = {"imatrix"}  # a file that the recipe names: no format is built with it
    assert {name for kind in FORMATS.values() for name in kind.options} == declared - {"search"} | of_recipe
