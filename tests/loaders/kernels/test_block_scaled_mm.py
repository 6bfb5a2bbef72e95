"""The arguments of scaled_mm for FP8 in blocks. No test here runs the GEMM: that takes a Hopper GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import ScalingType

from omni_convert.formats.schemes.fp8 import Fp8Block
from omni_convert.loaders.kernels.block_scaled_mm import BLOCK_SCALED_MM, run_block
from omni_convert.loaders.kernels.kernel import LayerTraits
from omni_convert.loaders.kernels.reference import REFERENCE

CUDA = torch.device("cuda")


def definition(codes, weight, scale, recipe, weight_scale, weight_recipe, bias, output_dtype):
    """The result of the operator, in float64."""
    assert (recipe, weight_recipe) == (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
    assert scale.stride(0) == weight_scale.stride(0) == 1
    groups = weight.shape[0] // 128
    values = codes.double() * scale.double().repeat_interleave(128, dim=1)
    blocks = weight_scale[:groups].double().repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    out = values @ (weight.double() * blocks)
    return (out if bias is None else out + bias.double()).to(output_dtype)


@pytest.mark.parametrize("rows", [1, 4, 13])
@pytest.mark.parametrize("in_features", [128, 640])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_operands_stand_for_the_layer(rows, in_features, has_bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, in_features, generator=generator)
    x = torch.randn(rows, in_features, generator=generator).bfloat16()
    bias = torch.randn(256, generator=generator).bfloat16() if has_bias else None
    tensors = Fp8Block().quantize(weight)
    out = run_block(x, tensors, Fp8Block(), bias, definition)
    expected = REFERENCE.run(x, tensors, Fp8Block(), bias)
    assert out.shape == expected.shape
    assert torch.allclose(out.float(), expected.float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 4, 13, 300])
@pytest.mark.parametrize("in_features", [128, 512, 640])
def test_torch_accepts_the_operands_on_a_cuda_device(rows, in_features):
    with FakeTensorMode():
        tensors = {
            "weight": torch.empty(384, in_features, dtype=torch.float8_e4m3fn, device=CUDA),
            "weight_scale_inv": torch.empty(3, in_features // 128, device=CUDA),
        }
        x = torch.empty(rows, in_features, dtype=torch.bfloat16, device=CUDA)
        out = run_block(x, tensors, Fp8Block(), torch.empty(384, device=CUDA))
    assert (tuple(out.shape), out.dtype) == ((rows, 384), torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "cuda", "block_size", "width", "reason"),
    [
        ((9, 0), "12.9", (128, 128), 256, None),
        ((9, 0), "13.0", (128, 128), 256, None),
        ((9, 0), "12.8", (128, 128), 256, "needs CUDA 12.9, torch is built for 12.8"),
        ((8, 9), "12.9", (128, 128), 256, "needs compute capability 9.0, found 8.9"),
        ((10, 0), "13.0", (128, 128), 256, "needs compute capability below 10.0, found 10.0"),
        ((9, 0), "12.9", (64, 128), 256, "needs blocks of (128, 128), found (64, 128)"),
        ((9, 0), "12.9", (128, 128), 192, "needs features divisible by 128, found 256 x 192"),
    ],
)
def test_it_declines_what_torch_would_refuse(monkeypatch, capability, cuda, block_size, width, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    layer = LayerTraits(Fp8Block(block_size), 256, width, CUDA)
    assert BLOCK_SCALED_MM.requirements.unmet(layer) == reason
