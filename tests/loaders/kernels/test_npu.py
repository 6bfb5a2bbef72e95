"""The arguments that torch_npu's operators receive. No test here runs them: that takes an Ascend 950."""

from types import SimpleNamespace

import pytest
import torch

from omni_convert.formats.format import Format
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.loaders.kernels.npu import run_mxfp4, run_mxfp4_dualscale, run_mxfp8
from omni_convert.loaders.memory.layout import memory_tensors

ROWS, OUT = 5, 64
CODES, SCALE, LEVEL0, LEVEL1 = "codes of x", "scale of x", "level 0 of x", "level 1 of x"


class Recorder(SimpleNamespace):
    """Stands where torch_npu would: keeps what its operators are given, under their documented parameter names."""

    def __init__(self) -> None:
        super().__init__(float8_e8m0fnu="e8m0", float4_e2m1fn_x2="e2m1")

    def npu_dynamic_mx_quant(self, input, *, axis, round_mode, dst_type, block_size, scale_alg):  # noqa: A002  # theirs
        self.quantize = {"input": input, "dst_type": dst_type}
        assert (axis, round_mode, block_size, scale_alg) == (-1, "rint", 32, 0)
        return CODES, SCALE

    def npu_quant_matmul(self, x1, x2, scale, **options):
        self.multiply = {"x1": x1, "x2": x2, "scale": scale, **options}
        return torch.zeros(ROWS, x2.shape[1], dtype=options["output_dtype"])

    def npu_dynamic_dual_level_mx_quant(self, input, *, smooth_scale=None, round_mode="rint"):  # noqa: A002  # theirs
        assert (smooth_scale, round_mode) == (None, "rint")
        self.quantize = {"input": input}
        return CODES, LEVEL0, LEVEL1

    def npu_format_cast(self, tensor, layout, *, customize_dtype):
        assert (tensor.dtype, layout, customize_dtype) == (torch.int8, 29, torch.int8)
        self.cast = tensor
        return tensor

    def npu_dual_level_quant_matmul(
        self, x1, x2, x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale, bias=None, output_dtype=None
    ):
        assert (x1, x1_level0_scale, x1_level1_scale) == (CODES, LEVEL0, LEVEL1)
        self.multiply = {"x2": x2, "level0": x2_level0_scale, "level1": x2_level1_scale, "bias": bias}
        return torch.zeros(ROWS, len(x2), dtype=output_dtype)


def make(fmt: Format, in_features: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = fmt.quantize(torch.randn(OUT, in_features, generator=generator))
    if "mul_scale" in tensors:
        tensors["mul_scale"] = torch.rand(in_features, generator=generator).add(0.5).bfloat16().float()
    return torch.randn(ROWS, in_features, generator=generator).bfloat16(), memory_tensors(fmt, tensors)


def paired(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(OUT, -1, 2).transpose(0, 1)


def test_mxfp8_gets_transposed_codes_and_paired_scales():
    x, tensors = make(Mxfp8(), 128)
    npu = Recorder()
    out = run_mxfp8(x, tensors, Mxfp8(), torch.ones(OUT, dtype=torch.bfloat16), npu)
    assert (tuple(out.shape), out.dtype) == ((ROWS, OUT), torch.bfloat16)
    assert npu.quantize["input"] is x
    assert npu.quantize["dst_type"] is torch.float8_e4m3fn
    assert torch.equal(npu.multiply.pop("x2").float(), tensors["weight"].t().float())
    assert torch.equal(npu.multiply.pop("scale"), paired(tensors["weight_scale"]))
    assert torch.equal(npu.multiply.pop("bias"), torch.ones(OUT))
    assert npu.multiply == {
        "x1": CODES,
        "pertoken_scale": SCALE,
        "scale_dtype": "e8m0",
        "pertoken_scale_dtype": "e8m0",
        "output_dtype": torch.bfloat16,
        "group_sizes": [1, 1, 32],
    }


def test_an_odd_number_of_scales_is_filled_up_with_byte_0():
    x, tensors = make(Mxfp8(), 96)
    npu = Recorder()
    run_mxfp8(x, tensors, Mxfp8(), None, npu)
    scale = npu.multiply["scale"]
    assert tuple(scale.shape) == (2, OUT, 2)
    assert not scale[1, :, 1].any()
    assert torch.equal(scale.transpose(0, 1).flatten(1)[:, :3], tensors["weight_scale"])
    assert npu.multiply["bias"] is None


@pytest.mark.parametrize("smooth", [False, True])
def test_mxfp4_gets_the_smoothed_input_and_packed_codes(smooth):
    fmt = Mxfp4(smooth=smooth)
    x, tensors = make(fmt, 128)
    npu = Recorder()
    out = run_mxfp4(x.float(), tensors, fmt, None, npu)
    assert out.dtype is torch.float32
    assert npu.quantize["dst_type"] == "e2m1"
    expected = x * tensors["mul_scale"].bfloat16() if smooth else x
    assert torch.equal(npu.quantize["input"], expected)
    assert npu.multiply["x2"].shape == (64, OUT)
    assert npu.multiply["x2"].data_ptr() == tensors["weight"].data_ptr()
    assert torch.equal(npu.multiply["scale"], paired(tensors["weight_scale"]))
    options = {"x1_dtype": "e2m1", "x2_dtype": "e2m1", "scale_dtype": "e8m0", "pertoken_scale_dtype": "e8m0"}
    options |= {"output_dtype": torch.bfloat16, "group_sizes": [1, 1, 32], "pertoken_scale": SCALE, "x1": CODES}
    assert npu.multiply.items() >= options.items()


def test_dual_scale_gets_both_levels_of_both_sides():
    fmt = Mxfp4DualScale()
    x, tensors = make(fmt, 1088)
    npu = Recorder()
    out = run_mxfp4_dualscale(x, tensors, fmt, torch.ones(OUT, dtype=torch.bfloat16), npu)
    assert (tuple(out.shape), out.dtype) == ((ROWS, OUT), torch.bfloat16)
    assert torch.equal(npu.quantize["input"], x * tensors["mul_scale"].bfloat16())
    assert npu.cast.data_ptr() == tensors["weight"].data_ptr()
    assert npu.multiply["x2"] is npu.cast
    assert torch.equal(npu.multiply["level0"], tensors["weight_dual_scale"][..., 0].t())
    assert npu.multiply["level0"].is_contiguous()
    assert torch.equal(npu.multiply["level1"], tensors["weight_scale"].view(OUT, -1, 2))
    assert npu.multiply["bias"].dtype is torch.float32
