"""ConvRot W4A4: golden bytes of comfy-kitchen, the search, reading back, and who holds it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from omni_convert.convert.recipe import Recipe
from omni_convert.formats.dialects.comfyui import COMFYUI
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.schemes.convrot_w4a4 import ConvrotW4A4
from omni_convert.loaders import quantize_linear

# Group to the codes and scales that comfy-kitchen 0.2.40 has for the weight of `golden_weight`.
GOLDEN = {
    16: (
        "4721f043caeed1ef33241f13eefd13bf3254dd0fefbc33f002720c20eccc31132031eeddf1e034320021dabcf3de3754db03cdfe02e25523"
        "cb0fffbc56113143",
        "53698d3fbb227b3f",
    ),
    64: (
        "5514f023dddef4bd25322f44cafdf1d03572dd30cbbc12121065fbfff0cb53e21122cbeed0cf473300200dac13ff2353eb11e0ee22024122"
        "cbf1dccd25f04444",
        "66197f3f2f45883f",
    ),
}


def golden_weight() -> Tensor:
    """float32 [2, 64]."""
    index = torch.arange(128, dtype=torch.float64)
    return ((0.37 * index).sin() * (1 + index % 7)).float().view(2, 64)


@pytest.mark.parametrize("group", GOLDEN)
def test_golden_bytes(group: int) -> None:
    tensors = ConvrotW4A4(group, search=False).quantize(golden_weight())
    codes, scales = GOLDEN[group]
    assert bytes(tensors["weight"].flatten().tolist()).hex() == codes
    expected = torch.tensor(list(bytes.fromhex(scales)), dtype=torch.uint8).view(torch.float32)
    torch.testing.assert_close(tensors["weight_scale"].flatten(), expected, rtol=2**-22, atol=0)


def test_the_search_lowers_the_error_and_never_raises_that_of_a_row() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))

    def errors(fmt: ConvrotW4A4) -> Tensor:
        return (fmt.dequantize(fmt.quantize(weight)) - weight).norm(dim=1) / weight.norm(dim=1)

    plain, searched = errors(ConvrotW4A4(search=False)), errors(ConvrotW4A4())
    assert bool((searched <= plain + 1e-6).all())
    assert float(searched.mean()) < 0.9 * float(plain.mean())
    assert float(searched.mean()) < 0.13


def test_a_zero_row_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1
    restored = ConvrotW4A4(16).dequantize(ConvrotW4A4(16).quantize(weight))
    assert not restored[0].any()
    torch.testing.assert_close(restored[1], weight[1], rtol=0, atol=0.01)


def test_a_layer_runs_with_inputs_of_four_bits() -> None:
    linear = nn.Linear(256, 64, dtype=torch.bfloat16)
    layer = quantize_linear(linear, "convrot_w4a4")
    x = torch.randn(8, 256, dtype=torch.bfloat16)
    assert isinstance(layer.format, ConvrotW4A4)
    expected = layer.format.round_inputs(x, {}) @ layer.dequantize().T + linear.bias.float()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.03)


def test_comfyui_alone_holds_it_and_is_chosen() -> None:
    fmt = ConvrotW4A4().for_weight((64, 192))
    assert fmt.group == 64
    for name in WRITTEN:
        assert isinstance(DIALECTS[name].spelling(fmt, (64, 192)), str) == (name != "comfyui"), name
    spelling = COMFYUI.spelling(fmt, (64, 192))
    assert not isinstance(spelling, str)
    assert json.loads(spelling.extras["comfy_quant"]) == {"format": "convrot_w4a4", "convrot_groupsize": 64}
    stored = spelling.layout(fmt.layout(64, 192))
    assert (stored["weight"].dtype, stored["weight"].shape) == (torch.int8, (64, 96))
    assert (stored["weight_scale"].dtype, stored["weight_scale"].shape) == (torch.float32, (64,))
    assert Recipe(method="convrot_w4a4").dialect == "comfyui"
    assert isinstance(COMFYUI.spelling(ConvrotW4A4(16), (64, 48)), str)
