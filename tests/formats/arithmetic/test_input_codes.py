"""Activation quantization follows the serving runtime's arithmetic."""

import pytest
import torch

from omni_convert.formats.arithmetic.input_codes import fp8_per_group, fp8_per_token, fp8_static, int8_per_token


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16()


def test_static_fp8_saturates_instead_of_overflowing():
    x = torch.tensor([[1.0, -900.0, 500.0, 0.0]], dtype=torch.bfloat16)
    codes = fp8_static(x, torch.tensor(1.0))
    assert codes.float().tolist() == [[1.0, -448.0, 448.0, 0.0]]


def test_per_token_fp8_gives_the_largest_value_of_each_token_the_largest_code(x):
    codes, scale = fp8_per_token(x)
    assert scale.shape == (5, 1)
    assert torch.equal(scale, x.float().abs().amax(1, keepdim=True) / 448)
    assert torch.equal(codes.float().abs().amax(1), torch.full((5,), 448.0))


def test_a_zero_token_gets_the_runtimes_smallest_scale_and_zero_codes():
    codes, scale = fp8_per_token(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert scale.flatten().tolist() == pytest.approx([1 / (448 * 512)] * 2)
    assert not codes.float().any()


def test_per_group_fp8_scales_each_group_of_a_token_by_itself(x):
    codes, scale = fp8_per_group(x, 64)
    assert codes.shape == (5, 2, 64)
    assert scale.shape == (5, 2, 1)
    assert torch.equal(scale[:, 1, 0], x[:, 64:].float().abs().amax(1) / 448)
    restored = (codes.float() * scale).flatten(1)[:, :96]
    assert torch.allclose(restored, x.float(), rtol=1 / 16, atol=1e-3)


def test_per_token_int8_rounds_half_to_even_and_uses_127_levels():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    codes, scale = int8_per_token(x)
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]
    assert scale.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("magnitude", "code"), [(1e38, 127), (1e-36, 127), (1e-37, 32), (1e-39, 0), (1e-45, 0)])
def test_per_token_int8_holds_tokens_of_any_size(magnitude: float, code: int):
    codes, scale = int8_per_token(torch.tensor([[magnitude, -magnitude, 0.0]]))
    assert codes.tolist() == [[code, -code, 0]]
    assert scale.item() == pytest.approx(magnitude / 127, rel=1e-6, abs=1e-44)
