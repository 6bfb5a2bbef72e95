"""W4A8 and W6A8: golden bytes of comfy-kitchen, the search, and who holds them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from omni_convert.convert.recipe import Recipe
from omni_convert.formats.arithmetic.search import nearest_level
from omni_convert.formats.dialects.comfyui import COMFYUI
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.schemes.rotated_grid import W4a8, W6a8, _errors, _indices, _IntegerLevels, _TableLevels
from omni_convert.loaders import quantize_linear

# Codes, relative steps and steps of rows that comfy-kitchen 0.2.40 has for the weight of `golden_weight`.
GOLDEN = {
    W4a8(16, search=False): (
        "dfba68dc20454946dcbea6ad34529d06dcfe22864601cd578afb73a74332c99cb8ea43126948efec78a930136c44cfec318c12647b4afebc"
        "20766712ef9ac9ec",
        "6f6b6c706a706d6d",
        "150a723d02bf583d",
    ),
    W6a8(16): (
        "4ea6d11fd459466a10a67a62378d532a1dd5ed1c5b4bf29028faf17e612ee53dafe65056bfb9451bfe90056bea9545aab35860bcc4406d6c"
        "e2852490ae450f71371d9eb6ea58c8afa20dcd5b9f672580ea0566efa61456ffa45066af9005affe",
        "4844454943484645",
        "fb98763de44d5e3d",
    ),
}


def golden_weight() -> Tensor:
    """float32 [2, 64]."""
    index = torch.arange(128, dtype=torch.float64)
    return ((0.37 * index).sin() * (1 + index % 7)).float().view(2, 64)


@pytest.mark.parametrize("fmt", GOLDEN, ids=lambda fmt: fmt.method)
def test_golden_bytes(fmt: W4a8) -> None:
    tensors = fmt.quantize(golden_weight())
    codes, steps, row_steps = GOLDEN[fmt]
    assert bytes(tensors["weight"].flatten().tolist()).hex() == codes
    assert bytes(tensors["weight_scale"].view(torch.uint8).flatten().tolist()).hex() == steps
    expected = torch.tensor(list(bytes.fromhex(row_steps)), dtype=torch.uint8).view(torch.float32)
    torch.testing.assert_close(tensors["weight_scale_2"].flatten(), expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize("method", ["w4a8", "w6a8"])
def test_levels_on_the_grid_are_those_of_a_search_through_all(method: str) -> None:
    """Small steps, steps with which several levels meet at the end of the grid, and numbers beyond it."""
    levels = _TableLevels.on(torch.device("cpu")) if method == "w4a8" else _IntegerLevels(torch.device("cpu"))
    bits = torch.arange(1, 0x7F, dtype=torch.int16).repeat_interleave(8)[None]
    target = torch.randn(16, *bits.shape, generator=torch.Generator().manual_seed(0)) * 60
    target[:4], target[4:6] = target[:4].round(), target[4:6].round() + 0.5  # ties
    is_beyond = target.abs().amax(dim=0) >= 127
    grid = (levels.numbers * bits.to(torch.uint8).view(torch.float8_e4m3fn).float()[..., None]).round().clamp(-127, 127)
    expected = nearest_level(target.permute(1, 2, 0), grid)
    assert _indices(target, bits, is_beyond, levels).permute(1, 2, 0).equal(expected.float())
    squares = (grid.gather(2, expected) - target.permute(1, 2, 0)).square()
    torch.testing.assert_close(_errors(target, bits, levels), squares.sum(dim=2), rtol=1e-6, atol=0)


def test_numbers_between_levels_take_the_one_that_comfy_kitchen_finds_nearer() -> None:
    levels = _TableLevels.on(torch.device("cpu"))
    middles = (levels.numbers[1:] + levels.numbers[:-1]) / 2
    near = (middles.view(torch.int32)[:, None] + torch.arange(-99, 99, dtype=torch.int32)).view(torch.float32)
    assert levels.nearest(near.clone()).equal(levels.numbers[nearest_level(near, levels.numbers)])


def error(fmt: W4a8, weight: Tensor) -> float:
    return float((fmt.dequantize(fmt.quantize(weight)) - weight).norm() / weight.norm())


def test_the_search_lowers_the_error() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    assert error(W4a8(), weight) < 0.99 * error(W4a8(search=False), weight)
    assert error(W4a8(), weight) < 0.0725
    assert error(W6a8(), weight) < 0.0211


@pytest.mark.parametrize("kind", [W4a8, W6a8])
def test_tiny_and_zero_rows_are_held(kind: type[W4a8]) -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2] = 0, weight[2] * 1e-3
    fmt = kind()
    restored = fmt.dequantize(fmt.quantize(weight))
    assert float(restored[1].abs().max()) < 1e-6
    assert float((restored[2] - weight[2]).norm()) < 0.1 * float(weight[2].norm())


@pytest.mark.parametrize("method", ["w4a8", "w6a8"])
def test_a_layer_runs_on_inputs_of_eight_bits(method: str) -> None:
    linear = nn.Linear(256, 64, dtype=torch.bfloat16)
    layer = quantize_linear(linear, method)
    x = torch.randn(8, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = linear(x).float()
        assert float((layer(x).float() - exact).norm()) < 0.1 * float(exact.norm())
        assert layer(x).dtype is torch.bfloat16


@pytest.mark.parametrize("fmt", [W4a8(64), W6a8(64)], ids=lambda fmt: fmt.method)
def test_comfyui_alone_holds_it_and_is_chosen(fmt: W4a8) -> None:
    for name in WRITTEN:
        assert isinstance(DIALECTS[name].spelling(fmt, (64, 192)), str) == (name != "comfyui"), name
    spelling = COMFYUI.spelling(fmt, (64, 192))
    assert not isinstance(spelling, str)
    mark = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}
    assert spelling.extras["comfy_quant"].decode() == json.dumps(mark)
    stored = spelling.layout(fmt.layout(64, 192))
    assert stored["weight"].dtype is torch.int8
    assert stored["weight_s_channel"].shape == (64,)
    assert stored["weight_s_rel"].shape == (64, 12)
    assert ("weight_codebook" in stored) == (fmt.method == "w4a8")
    assert Recipe(method=fmt.method).dialect == "comfyui"
    assert isinstance(COMFYUI.spelling(fmt, (64, 200)), str)
