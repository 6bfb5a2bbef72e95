"""Memory that kernels compute in is kept from call to call, and no call or thread sees another's."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from omni_convert.formats.arithmetic.scratch import MOST_BYTES, Scratch
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear, quantize_linear


@pytest.fixture(params=["int8", "fp8"])
def layer(request: pytest.FixtureRequest) -> QuantizedLinear:
    torch.manual_seed(0)
    return quantize_linear(torch.nn.Linear(64, 48).bfloat16(), request.param)


def test_a_thread_keeps_its_memory_and_allocates_more_than_that():
    scratch = Scratch()
    first = scratch.take(10, torch.float32)
    assert scratch.take(5, torch.int16).data_ptr() == first.data_ptr()
    assert scratch.take(MOST_BYTES + 1, torch.int8).data_ptr() != first.data_ptr()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(scratch.take, 10, torch.float32).result().data_ptr() != first.data_ptr()


def test_outputs_stay_as_they_are_when_other_inputs_follow(layer: QuantizedLinear):
    inputs = torch.randn(8, 40, 64).bfloat16()
    expected = [layer(x).clone() for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(layer, inputs))
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def test_memory_serves_inference_and_training_alike(layer: QuantizedLinear):
    x = torch.randn(4, 64).bfloat16()
    with torch.inference_mode():
        expected = layer(x).clone()
    assert torch.equal(layer(x.requires_grad_()).detach(), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_no_rows_give_no_rows(layer: QuantizedLinear):
    assert layer(torch.empty(2, 0, 64, dtype=torch.bfloat16)).shape == (2, 0, 48)


def test_a_default_device_does_not_choose_where_memory_is():
    scratch = Scratch()
    with torch.device("meta"):
        assert scratch.take(4, torch.uint8).device.type == "cpu"
    assert scratch.take(4, torch.uint8).zero_().tolist() == [0, 0, 0, 0]
