"""The bytes that every format must give for one small matrix, as computed by other implementations of the formats."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import encode_e2m1, pack_nibbles
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4


def sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def packed(values: Tensor) -> Tensor:
    """Numeric E2M1 values in their container to bytes of two codes, even k in the low nibble."""
    return pack_nibbles(encode_e2m1(values.float()))


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """[2, 1024], exact in bfloat16: pseudo-random in k, with blocks of five magnitudes."""
    n, k = torch.arange(2)[:, None], torch.arange(1024)[None]
    values = (((37 * k + 11 * n * k + 5 * n) % 101) - 50) / 16 * (1 + n) * 2.0 ** (-((k // 32) % 5))
    return values.to(torch.bfloat16)


def test_the_matrix_is_the_golden_one(weight: Tensor) -> None:
    assert sha(weight) == "eab0c6ce38000dca"
    assert weight[0, :8].tolist() == [-3.125, -0.8125, 1.5, -2.5, -0.1875, 2.125, -1.875, 0.4375]


def test_int8(weight: Tensor) -> None:
    tensors = Int8().quantize(weight)
    assert tensors["weight_scale"].tolist() == [[float.fromhex("0x1.93264cp-6")], [float.fromhex("0x1.93264cp-5")]]
    assert tensors["weight"][0, :8].tolist() == [-127, -33, 61, -102, -8, 86, -76, 18]
    assert sha(tensors["weight"]) == "854f724ddf41b8dc"


def test_fp8(weight: Tensor) -> None:
    tensors = Fp8().quantize(weight)
    assert tensors["weight_scale"].item() == pytest.approx(0.013950892724, abs=1e-12)
    assert tensors["weight"].view(torch.uint8)[0, :8].tolist() == [246, 231, 109, 243, 213, 114, 240, 96]
    assert sha(tensors["weight"]) == "56c563ee52d21aaf"


def test_fp8_block(weight: Tensor) -> None:
    tensors = Fp8Block((128, 128)).quantize(weight)
    common = 0.0139508927
    expected = [common, common, 0.013671875, common, 0.0068359375, common, common, common]
    assert tensors["weight_scale_inv"][0].tolist() == pytest.approx(expected, abs=1e-10)
    assert sha(tensors["weight"]) == "85e705bbcebda169"


@pytest.mark.parametrize(
    ("scale_rule", "expected"), [("msmodelslim", "4e2945aa864879e9"), ("floor", "b4ef3ca00dde6a76")]
)
def test_mxfp8(weight: Tensor, scale_rule: str, expected: str) -> None:
    tensors = Mxfp8(scale_rule).quantize(weight)
    assert sha(tensors["weight"]) == expected
    assert sha(tensors["weight_scale"]) == "e0a274f0188bcfee"
    assert tensors["weight_scale"][0, :6].tolist() == [120, 119, 118, 117, 116, 120]
    assert tensors["weight_scale"][1, :6].tolist() == [121, 120, 119, 118, 117, 121]


def test_mxfp8_half_away_bytes(weight: Tensor) -> None:
    codes = Mxfp8("msmodelslim").quantize(weight)["weight"].view(torch.uint8)
    assert codes[0, :8].tolist() == [253, 237, 116, 250, 220, 121, 247, 102]


@pytest.mark.parametrize("scale_rule", ["msmodelslim", "msmodelslim_ceil_x"])
def test_mxfp4_half_away(weight: Tensor, scale_rule: str) -> None:
    tensors = Mxfp4(scale_rule).quantize(weight)
    assert sha(tensors["weight"]) == "9c81439475e899a1"
    assert sha(packed(tensors["weight"])) == "f19d9516fcbab485"
    assert packed(tensors["weight"])[0, :4].tolist() == [191, 245, 105, 46]
    assert sha(tensors["weight_scale"]) == "c567d133e9fc6092"
    assert tensors["weight_scale"][0, :6].tolist() == [126, 125, 124, 123, 122, 126]


@pytest.mark.parametrize("scale_rule", ["floor", "even", "uos"])
def test_mxfp4_half_even(weight: Tensor, scale_rule: str) -> None:
    tensors = Mxfp4(scale_rule).quantize(weight)
    assert sha(packed(tensors["weight"])) == "dd87a18bb837dfab"
    assert sha(tensors["weight_scale"]) == "c567d133e9fc6092"


@pytest.mark.parametrize("scale_rule", ["msmodelslim", "floor"])
def test_mxfp4_dualscale(weight: Tensor, scale_rule: str) -> None:
    fmt = Mxfp4DualScale(scale_rule)
    tensors = fmt.quantize(weight)
    assert tensors["weight"][0, :8].float().tolist() == [-6, -1.5, 3, -4, -0.5, 4, -4, 1]
    assert sha(tensors["weight"]) == "eb1f5bb1d28fbb1e"
    assert sha(packed(tensors["weight"])) == "b27f36bad3a0ebf3"
    assert tensors["weight_scale"][0, :8].tolist() == [127, 126, 125, 124, 123, 127, 126, 125]
    assert sha(tensors["weight_scale"]) == "ee9b4a9bf2a88000"
    assert tensors["weight_dual_scale"].shape == (2, 2, 1)
    assert sha(tensors["weight_dual_scale"]) == "34f6b325ead87d3e"
    assert torch.equal(tensors["mul_scale"], torch.ones(1024))
    error = (fmt.dequantize(tensors) - weight.float()).norm() / weight.float().norm()
    assert error.item() == pytest.approx(0.10877, abs=1e-5)


def test_nvfp4(weight: Tensor) -> None:
    tensors = Nvfp4(search=False).quantize(weight)
    assert tensors["weight_scale_2"].item() == pytest.approx(0.00232514879, abs=1e-11)
    assert tensors["weight_scale"].view(torch.uint8)[0, :4].tolist() == [118, 118, 109, 110]
    assert tensors["weight"][0, :4].tolist() == [191, 229, 105, 46]
    assert sha(tensors["weight"]) == "e03498aa5ca73433"
    assert sha(tensors["weight_scale"]) == "b21fe06aa0671bb1"


def test_nvfp4_in_comfy_nibble_order(weight: Tensor) -> None:
    from omni_convert.formats.arithmetic.e2m1 import unpack_nibbles

    codes = unpack_nibbles(Nvfp4(search=False).quantize(weight)["weight"])
    assert pack_nibbles(codes, even="high")[0, :4].tolist() == [251, 94, 150, 226]
