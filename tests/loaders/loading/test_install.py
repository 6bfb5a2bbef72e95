"""Layers are put in as the tensors have them, and as the block says."""

import pytest
import torch
from torch import nn

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.loaders.loading.install import install_empty_layers
from omni_convert.loaders.loading.select import stored_layers


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per row"])
def test_the_one_scale_of_a_single_row_is_that_of_either_block(per_channel):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 1))
    specs = {
        "0.weight": TensorSpec("0.weight", torch.float8_e4m3fn, (1, 8)),
        "0.weight_scale": TensorSpec("0.weight_scale", torch.float32, (1,)),
        "0.bias": TensorSpec("0.bias", torch.bfloat16, (1,)),
    }
    config = QuantizationConfig("fp8", per_channel=per_channel)
    assert install_empty_layers(model, specs, stored_layers(specs, config, "checkpoint"), "checkpoint") == {
        "0.weight",
        "0.weight_scale",
    }
    assert model[0].format.label == ("fp8 per row" if per_channel else "fp8")
