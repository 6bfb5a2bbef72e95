"""Layers run in the modes of torch that have no numbers, gradients or devices of their own, and as ever afterwards."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from omni_convert.formats.table import LOADABLE
from omni_convert.loaders.attention.arithmetic import rotate_heads
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear, quantize_linear

METHODS = [method for method in LOADABLE if method != "fp8_storage"]


@pytest.fixture(params=METHODS)
def layer(request: pytest.FixtureRequest) -> QuantizedLinear:
    torch.manual_seed(0)
    return quantize_linear(torch.nn.Linear(128, 48).bfloat16(), request.param)


@pytest.mark.parametrize("activations", ["quantized", "bf16"])
def test_layers_can_be_traced_without_numbers_and_run_afterwards(layer, activations):
    layer.activations = activations
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        traced = layer(mode.from_tensor(x))
    assert isinstance(traced, FakeTensor)
    assert traced.shape == expected.shape
    assert torch.equal(layer(x), expected)


def test_layers_run_in_inference_mode_and_outside_of_it(layer):
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        expected = layer(x).clone()
    assert torch.equal(layer(x), expected)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


def test_a_rotation_that_was_traced_or_inferred_first_serves_every_call():
    x = torch.randn(1, 2, 1, 512)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(rotate_heads(mode.from_tensor(x)), FakeTensor)
    with torch.inference_mode(), torch.device("meta"):
        expected = rotate_heads(x).clone()
    assert torch.equal(rotate_heads(x), expected)
    assert torch.allclose(expected.norm(), x.norm() / 2**0.5)


@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale", "nvfp4", "w4a16"])
def test_codes_of_four_bits_survive_where_subnormal_numbers_are_flushed(method):
    torch.manual_seed(0)
    layer = quantize_linear(torch.nn.Linear(1024, 48).bfloat16(), method)
    x = torch.randn(4, 1024).bfloat16()
    expected = layer(x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_flush_denormal(False)
