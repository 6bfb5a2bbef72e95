"""FP8 storage halves the weights of encoders and VAEs, and their own forward runs on what the codes stand for."""

import copy
import io

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.fp8 import Fp8
from omni_convert.loaders import apply_fp8_weight_storage

LAYERS = [nn.Linear(6, 4), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 2)]


def saved_and_loaded(layer):  # torch cannot pickle float8 tensors otherwise
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layer_computes_with_what_its_codes_stand_for(layer):
    plain = copy.deepcopy(layer)
    stored = apply_fp8_weight_storage(copy.deepcopy(layer))
    shape = plain.weight.shape
    assert stored.state_dict()["weight"].dtype is torch.float8_e4m3fn
    assert stored.state_dict()["weight"].shape == shape
    rows = plain.weight.detach().flatten(1)
    plain.weight.data = Fp8().dequantize(Fp8().quantize(rows)).view(shape)
    x = torch.randn(2, *((6,) if isinstance(layer, nn.Linear) else (3,) + (5,) * (len(shape) - 2)))
    for again in (stored, copy.deepcopy(stored), saved_and_loaded(stored)):
        assert torch.equal(again(x), plain(x))


def test_a_vae_takes_half_the_bytes_and_a_cast_leaves_codes_and_scales():
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=4, latent_channels=4).to(torch.bfloat16).eval()
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = vae(image.bfloat16()).sample.float()
    before = sum(tensor.nbytes for tensor in vae.state_dict().values())
    apply_fp8_weight_storage(vae)
    state = vae.state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) < 0.55 * before
    vae.to(torch.float32)
    for name, tensor in vae.state_dict().items():
        if name + "_scale" in state or name.endswith("weight_scale"):
            assert tensor.dtype is state[name].dtype
            assert torch.equal(tensor.float(), state[name].float())
    with torch.no_grad():
        error = (vae(image).sample - expected).norm() / expected.norm()
    assert 0 < error < 0.15


def test_a_tied_weight_stays_and_the_rest_is_stored():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "other": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    apply_fp8_weight_storage(model)
    assert model["head"].weight is model["embed"].weight
    assert model.state_dict()["other.weight"].dtype is torch.float8_e4m3fn


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(RecipeError, match="no Linear, Conv2d or Conv3d"):
        apply_fp8_weight_storage(nn.LayerNorm(4))
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        apply_fp8_weight_storage(nn.Sequential(linear))
