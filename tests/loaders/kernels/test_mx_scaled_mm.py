"""The arguments of scaled_mm for MXFP8 and NVFP4. No test here runs the GEMM: that takes a Blackwell GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType

from omni_convert.formats.arithmetic.e2m1 import E2M1_VALUES, unpack_nibbles
from omni_convert.formats.arithmetic.e8m0 import decode_e8m0
from omni_convert.formats.arithmetic.input_values import quantize_mxfp8_input, quantize_nvfp4_input
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_LARGEST
from omni_convert.formats.arithmetic.swizzle import unswizzle_scales
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.mx_scaled_mm import run_mxfp8, run_nvfp4

# Values of the codes 0 to 15.
VALUES = torch.tensor(E2M1_VALUES)

ROWS, OUT, IN = 5, 64, 160


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16()


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).bfloat16()


class Recorder:
    """Stands where the operator would, keeps what it is given, and lets torch's checks of a CUDA device judge it."""

    def __call__(self, *operands, **options):
        self.operands, self.options = operands, options
        with FakeTensorMode():
            out = F.scaled_mm(*map(on_cuda, operands), **{key: on_cuda(value) for key, value in options.items()})
        return torch.zeros(out.shape, dtype=out.dtype)


def on_cuda(value):
    if isinstance(value, list):
        return [on_cuda(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    return value


@pytest.mark.parametrize("bias", [None, torch.ones(OUT)], ids=["no bias", "bias"])
def test_mxfp8_gets_codes_and_swizzled_scales_of_both_sides(x, weight, bias):
    tensors = Mxfp8().quantize(weight)
    scaled_mm = Recorder()
    out = run_mxfp8(x, tensors, Mxfp8(), bias, scaled_mm)
    assert (tuple(out.shape), out.dtype) == ((ROWS, OUT), torch.bfloat16)
    codes, weight_codes, scale, recipe, weight_scale, weight_recipe = scaled_mm.operands
    assert recipe == weight_recipe == ScalingType.BlockWise1x32
    assert scale.dtype is weight_scale.dtype is torch.float8_e8m0fnu
    assert scale.numel() == 128 * 8  # 5 x 5 in tiles of 128 x 4
    linear = decode_e8m0(unswizzle_scales(scale, ROWS, IN // 32)).repeat_interleave(32, dim=1)
    assert torch.equal(codes.float() * linear, quantize_mxfp8_input(x))
    assert torch.equal(weight_codes.float(), tensors["weight"].t().float())
    assert weight_codes.stride() == (1, IN)
    assert torch.equal(unswizzle_scales(weight_scale, OUT, IN // 32).view(torch.uint8), tensors["weight_scale"])
    expected = {"swizzle_a": SwizzleType.SWIZZLE_32_4_4, "swizzle_b": SwizzleType.SWIZZLE_32_4_4}
    assert scaled_mm.options.items() >= (expected | {"output_dtype": torch.bfloat16}).items()
    found = scaled_mm.options["bias"]
    assert found is None if bias is None else (found.dtype is torch.bfloat16 and torch.equal(found.float(), bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nvfp4_gets_packed_codes_and_two_levels_of_scales(x, weight, dtype):
    tensors = Nvfp4().quantize(weight) | {"input_scale": torch.tensor(9.0 / NVFP4_LARGEST)}
    scaled_mm = Recorder()
    out = run_nvfp4(x.to(dtype), tensors, Nvfp4(static=True), None, scaled_mm)
    assert (tuple(out.shape), out.dtype) == ((ROWS, OUT), dtype)
    codes, weight_codes, scales, recipe, weight_scales, weight_recipe = scaled_mm.operands
    assert recipe == weight_recipe == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    assert codes.dtype is weight_codes.dtype is torch.float4_e2m1fn_x2
    block_scale, global_scale = scales
    linear = unswizzle_scales(block_scale, ROWS, IN // 16).float().repeat_interleave(16, dim=1)
    values = VALUES[unpack_nibbles(codes.view(torch.uint8)).int()] * (linear * global_scale)
    assert torch.equal(values, quantize_nvfp4_input(x, tensors["input_scale"]))
    assert torch.equal(weight_codes.t().view(torch.uint8), tensors["weight"])
    found = unswizzle_scales(weight_scales[0], OUT, IN // 16)
    assert torch.equal(found.view(torch.uint8), tensors["weight_scale"].view(torch.uint8))
    assert [scale.tolist() for scale in (global_scale, weight_scales[1])] == [
        [tensors[name].item()] for name in ("input_scale", "weight_scale_2")
    ]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    assert scaled_mm.options["swizzle_a"] == scaled_mm.options["swizzle_b"] == swizzle
