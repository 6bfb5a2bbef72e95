from __future__ import annotations

import pytest
import torch

from omni_convert.formats.arithmetic.input_values import (
    quantize_mxfp4_dualscale_input,
    quantize_mxfp4_input,
    quantize_mxfp8_input,
    quantize_nvfp4_input,
)
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4


def activations(columns: int = 544) -> torch.Tensor:
    return torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_mx_inputs_are_quantized_like_weights_by_the_floor_rule() -> None:
    x = activations()
    for fmt, quantized in ((Mxfp8("floor"), quantize_mxfp8_input(x)), (Mxfp4("floor"), quantize_mxfp4_input(x))):
        expected = fmt.dequantize(fmt.quantize(x.flatten(0, 1)))
        assert quantized.shape == x.shape
        assert quantized.dtype is torch.float32
        assert torch.equal(quantized.flatten(0, 1), expected)


def test_scale_algorithm_2_is_the_uos_rule() -> None:
    x = activations()
    fmt = Mxfp4("uos")
    expected = fmt.dequantize(fmt.quantize(x.flatten(0, 1)))
    assert torch.equal(quantize_mxfp4_input(x, scale_algorithm=2).flatten(0, 1), expected)


def test_dual_level_check_vector() -> None:
    # The operator's own: x = 8.0 gives level 0 1.3333334, level-1 byte 127 and code 7 everywhere.
    quantized = quantize_mxfp4_dualscale_input(torch.full((2, 512), 8.0, dtype=torch.bfloat16))
    level0 = torch.tensor(8.0) * torch.tensor(1 / 6)
    assert level0.item() == pytest.approx(1.3333334)
    assert torch.equal(quantized, (6 * level0).expand(2, 512))


def test_dual_level_quotient_is_rounded_to_the_dtype_of_the_inputs() -> None:
    x = torch.zeros(1, 512)
    x[0, 0], x[0, 1] = (
        6.0,
        1.2499,
    )  # the quotient 1.2499 becomes the tie 1.25 in bfloat16, hence 1.0; 1.2499 gives 1.0 too
    x[0, 2] = 1.7499  # rounds to 1.5, but to the tie 1.75, hence 2, in bfloat16
    in_float32 = quantize_mxfp4_dualscale_input(x)
    in_bfloat16 = quantize_mxfp4_dualscale_input(x.bfloat16())
    assert in_float32[0, :3].tolist() == pytest.approx([6.0, 1.0, 1.5], rel=1e-6)
    assert in_bfloat16[0, :3].tolist() == pytest.approx([6.0, 1.0, 2.0], rel=1e-6)


def test_dual_level_error_is_small_and_short_groups_work() -> None:
    for columns in (64, 512, 576):
        x = activations(columns)
        error = (quantize_mxfp4_dualscale_input(x) - x.float()).norm() / x.float().norm()
        assert 0.05 < error < 0.13


def test_zero_inputs_stay_zero() -> None:
    zeros = torch.zeros(2, 512, dtype=torch.bfloat16)
    scale = torch.tensor(0.01)
    for quantized in (
        quantize_mxfp8_input(zeros),
        quantize_mxfp4_input(zeros),
        quantize_mxfp4_dualscale_input(zeros),
        quantize_nvfp4_input(zeros, scale),
    ):
        assert torch.equal(quantized, torch.zeros(2, 512))


def test_nvfp4_inputs_are_quantized_like_weights_over_the_static_scale() -> None:
    x = activations()
    fmt = Nvfp4(search=False)
    tensors = fmt.quantize(x.flatten(0, 1))
    quantized = quantize_nvfp4_input(x, tensors["weight_scale_2"])
    assert torch.allclose(quantized.flatten(0, 1), fmt.dequantize(tensors), rtol=1e-6, atol=0)


def test_nvfp4_inputs_beyond_the_static_scale_saturate() -> None:
    quantized = quantize_nvfp4_input(torch.full((1, 16), 100.0), torch.tensor(1.0 / 2688))
    assert torch.allclose(quantized, torch.ones(1, 16))
