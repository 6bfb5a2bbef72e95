"""INT8 of rotated weights (ConvRot): golden bytes of comfy-kitchen, and who holds it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.rotation import hadamard, largest_rotation_group, rotate, rotate_inputs
from omni_convert.formats.dialects.comfyui import COMFYUI
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.schemes.int8 import Int8, RotatedInt8
from omni_convert.formats.table import build_format

# Group to the codes and scales that comfy-kitchen 0.2.40 has for the weight of `golden_weight`.
GOLDEN = {
    16: (
        "774e192704f33b4590b3e5d319cfe8d72e34421fef163412e4d9c7e8370feea72a37455ec2c7f203f0debca53a3000ea22072a7fbcfdf91f"
        "bcd5b0c0163c390d081f163bd5e4c8c60cf601df503d223c08f9121e8fc9bea538e8d4cf7f3f465ca7d22f04c2b1dcef22f81bd956623622"
        "9eb7f600f7f4bca8665219131139354d",
        "286b793d57795d3d",
    ),
    64: (
        "60634115fce73a21d0c5d8cb40e7c9a4572d2439f523424095bbcae918f408cc5231277fc4cbf82fa3c0bf9e1b191c1602145576acf1f1f7"
        "00ea9eb63d5f23e00b172d2ba0bbd7dd00c6eec07f4c303203fef827d0f9b99b3f19ebf53f26305aaadb120f00e2d5df2b292dfe19472124"
        "a9b80ff5bfcacbc0531c03ef45494242",
        "29f8603dc659703d",
    ),
}


def golden_weight() -> Tensor:
    """float32 [2, 64]."""
    index = torch.arange(128, dtype=torch.float64)
    return ((0.37 * index).sin() * (1 + index % 7)).float().view(2, 64)


def hex_of(tensor: Tensor) -> str:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()).hex()


@pytest.mark.parametrize("group", GOLDEN)
def test_golden_bytes(group: int) -> None:
    tensors = RotatedInt8(group).quantize(golden_weight())
    codes, scales = GOLDEN[group]
    assert hex_of(tensors["weight"]) == codes
    expected = torch.tensor(list(bytes.fromhex(scales)), dtype=torch.uint8).view(torch.float32)
    # The last bit of a sum depends on the order in which a processor adds.
    torch.testing.assert_close(tensors["weight_scale"].flatten(), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotating_twice_changes_nothing(group: int) -> None:
    values = torch.randn(3, 2 * group, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(rotate(values, group), group), values, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate_inputs(values, group), rotate(values, group), rtol=0, atol=1e-5)
    assert hadamard(group).sum(0).tolist() == [1.0] * group


@pytest.mark.parametrize(("columns", "group"), [(3072, 256), (3360, 16), (192, 64), (840, 4), (7, 1)])
def test_the_group_divides_the_columns(columns: int, group: int) -> None:
    assert largest_rotation_group(columns) == group
    fmt = RotatedInt8().for_weight((8, columns))
    assert fmt.group == group
    assert (fmt.unsupported(8, columns) is None) == (group >= 16)


def test_outliers_cost_less_than_without_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 1024, generator=generator)
    weight[:, 5] *= 50

    def error(fmt: Int8 | RotatedInt8) -> float:
        return float((fmt.dequantize(fmt.quantize(weight)) - weight)[:, 6:].norm())

    assert error(RotatedInt8(256)) < 0.5 * error(Int8())


def test_inputs_are_quantized_rotated() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 100
    plain, rotated = Int8().round_inputs(x, {}) - x, RotatedInt8(256).round_inputs(x, {}) - x
    assert float(rotated.norm()) < 0.3 * float(plain.norm())


def test_comfyui_alone_holds_it_and_marks_the_group() -> None:
    fmt = build_format("int8", rotate=True).for_weight((64, 192))
    for name in WRITTEN:
        assert isinstance(DIALECTS[name].spelling(fmt, (64, 192)), str) == (name != "comfyui"), name
    spelling = COMFYUI.spelling(fmt, (64, 192))
    assert not isinstance(spelling, str)
    mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    assert spelling.extras["comfy_quant"].decode() == json.dumps(mark)
    assert json.loads(COMFYUI.metadata({"a": fmt})["_quantization_metadata"])["layers"] == {"a": mark}
