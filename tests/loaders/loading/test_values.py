"""No value that a kernel would take for another number gets past loading, wherever in a tensor it lies."""

import pytest
import torch
from safetensors.torch import save_file

from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders.loading.pipeline_files import open_weights
from omni_convert.loaders.loading.values import PIECE, check_stored_values

E4M3 = torch.float8_e4m3fn


def as_e4m3(byte, count=64):
    return torch.full((count,), byte, dtype=torch.uint8).view(E4M3)


@pytest.fixture
def check(tmp_path):
    def run(name, tensor):
        file = tmp_path / "model.safetensors"
        save_file({name: tensor, "norm.weight": as_e4m3(0x7F)}, file)  # the other one is not asked for
        with open_weights([file]) as checkpoint:
            check_stored_values(checkpoint, {name}, "here")

    return run


@pytest.mark.parametrize("byte", range(256))
def test_each_code_but_the_two_nans_passes(check, byte):
    if byte in (0x7F, 0xFF):
        with pytest.raises(CheckpointError, match=r"here: a\.weight holds NaN"):
            check("a.weight", as_e4m3(byte))
    else:
        check("a.weight", as_e4m3(byte))


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 2 * PIECE + 6])
@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_a_nan_is_found_in_every_piece_of_a_tensor(check, place, nan):
    codes = torch.zeros(2 * PIECE + 7, dtype=torch.uint8)
    check("a.weight", codes.view(E4M3))
    codes[place] = nan
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        check("a.weight", codes.view(E4M3))


@pytest.mark.parametrize(
    ("suffix", "tensor", "is_sound"),
    [
        ("weight_scale", torch.tensor([1.0, 0.0]), True),
        ("weight_scale", torch.tensor([1.0, torch.inf]), False),
        ("weight_scale", torch.tensor([1.0, torch.nan]), False),
        ("weight_scale", torch.tensor([1.0, -1.0]), False),
        ("scales", torch.tensor([1.0, torch.nan], dtype=torch.float16), False),
        ("weight_scale", torch.tensor([0, 254], dtype=torch.uint8), True),
        ("weight_scale", torch.tensor([0, 255], dtype=torch.uint8), False),
        ("weight_scale", as_e4m3(0x7E), True),
        ("weight_scale", as_e4m3(0x80), True),  # -0
        ("weight_scale", as_e4m3(0x7F), False),
        ("weight_scale", as_e4m3(0x81), False),
        ("weight", torch.tensor([0, 255], dtype=torch.uint8), True),  # two codes of four bits
        ("qweight", torch.tensor([-1, 1], dtype=torch.int32), True),
        ("weight_scale", torch.empty(0), True),
    ],
)
def test_scales_are_finite_and_not_negative(check, suffix, tensor, is_sound):
    if is_sound:
        check(f"a.{suffix}", tensor)
    else:
        with pytest.raises(CheckpointError, match=r"NaN, Inf or a negative number"):
            check(f"a.{suffix}", tensor)
