"""The GEMM that decodes inside is exact up to float32 sums and one rounding; interpreted where there is no GPU."""

import pytest
import torch

from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.decoding import DECODERS
from omni_convert.loaders.kernels.fused_decode_mm import TRITON_DECODE_MM, run_fused
from omni_convert.loaders.kernels.kernel import LayerTraits, rounded_input
from omni_convert.loaders.kernels.table import KERNELS
from omni_convert.loaders.memory.layout import disk_tensors, memory_tensors
from omni_convert.loaders.memory.packed_int4 import PackedInt4

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot run")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = (
    Fp8(),
    Fp8Channel(),
    Fp8Block(),
    Fp8Block((16, 48)),
    Int8(),
    Mxfp8(),
    Mxfp4(),
    Mxfp4DualScale(),
    Nvfp4(),
    PackedInt4(32),
)
# (M, N, K): one row, neither a multiple of a tile, every size of tile, several tiles each way, several groups of 512
SHAPES = [(1, 24, 64), (3, 17, 33), (5, 33, 96), (16, 70, 192), (40, 72, 160), (150, 136, 320), (2, 24, 1088)]
CASES = [(fmt, shape) for fmt in FORMATS for shape in SHAPES if fmt.unsupported(*shape[1:]) is None]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.label}")


def make(fmt, outputs: int, columns: int, magnitude: float = 0.05):
    """Tensors on disk and in memory of random weights whose rows differ in size."""
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, columns, generator=generator) * magnitude
    stored = fmt.quantize(weight * torch.logspace(-2, 1, outputs)[:, None])
    return stored, memory_tensors(fmt, stored)


def fused(x, tensors, fmt, bias, is_rounded=False):
    placed = {suffix: tensor.to(DEVICE) for suffix, tensor in tensors.items()}
    return run_fused(x.to(DEVICE), placed, fmt, None if bias is None else bias.to(DEVICE), is_rounded).cpu()


def exact(x, stored, fmt, bias):
    """The product in float64, and what the terms of each sum add up to without their signs."""
    weight = fmt.dequantize(stored).double()
    bias = torch.zeros(1) if bias is None else bias
    return x.double() @ weight.t() + bias.double(), x.double().abs() @ weight.abs().t() + bias.double().abs()


@pytest.mark.parametrize(("fmt", "shape"), CASES, ids=str)
def test_the_product_is_exact_up_to_float32_sums(fmt, shape):
    rows, outputs, columns = shape
    stored, tensors = make(fmt, outputs, columns)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)) if rows > 1 else None
    product, terms = exact(x, stored, fmt, bias)
    out = fused(x, tensors, fmt, bias)
    assert out.dtype is torch.float32
    assert ((out.double() - product).abs() <= columns * 2**-24 * terms).all()


@every_format
@pytest.mark.parametrize("is_rounded", [False, True])
def test_bfloat16_comes_out_as_it_went_in_and_rounds_once_more(fmt, is_rounded):
    stored, tensors = make(fmt, 40, 192)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    # without input_scale, nvfp4 inputs are left alone; rounded mxfp4 and mxfp8 inputs fit bfloat16, others are cut
    inputs = rounded_input(x, tensors, fmt).bfloat16() if is_rounded else x
    assert torch.equal(inputs, rounded_input(x, tensors, fmt)) or not isinstance(fmt, Mxfp4 | Mxfp8) or not is_rounded
    product, terms = exact(inputs, stored, fmt, None)
    out = fused(x, tensors, fmt, None, is_rounded)
    assert out.dtype is torch.bfloat16
    rounding = 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter cuts off where devices round
    assert ((out.double() - product).abs() <= rounding * product.abs() + 192 * 2**-24 * terms).all()


def test_it_runs_on_cuda_devices_only_and_only_when_asked_for():
    names = [kernel.name for kernel in KERNELS]
    assert names.index("decode_mm") < names.index("triton_decode_mm")
    assert names.index("decode_weight_mm") < names.index("triton_decode_weight_mm")
    layer = LayerTraits(Mxfp4(), 64, 128, torch.device("cpu"))
    assert TRITON_DECODE_MM.requirements.unmet(layer) == "runs on cuda, not on cpu"


@every_format
def test_torch_compile_takes_it_without_a_graph_break(fmt):
    _, tensors = make(fmt, 40, 192)
    x = torch.randn(3, 192).bfloat16()
    torch.compiler.reset()  # the formats before this one are no recompilations of it
    compiled = torch.compile(lambda x: fused(x, tensors, fmt, None), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fused(x, tensors, fmt, None))


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.method != "w4a16"], ids=str)  # its scales are float16
@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_weights_far_from_one_are_decoded_all_the_same(fmt, magnitude):
    stored, tensors = make(fmt, 40, 192, magnitude)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    product, terms = exact(x, stored, fmt, None)
    out = fused(x, tensors, fmt, None)
    assert out.dtype is torch.float32
    assert ((out.double() - product).abs() <= 192 * 2**-24 * terms).all()


def test_it_runs_every_format_that_can_be_decoded():
    known = {fmt for fmt, decoder in DECODERS.items() if decoder.operands is not None}
    assert set(TRITON_DECODE_MM.requirements.formats) == known == set(DECODERS) - {Nf4}


@pytest.mark.parametrize("fmt", [PackedInt4(24), Fp8Block((128, 40))], ids=str)
def test_groups_that_tensor_cores_cannot_step_through_are_declined(fmt):
    layer = LayerTraits(fmt, 64, 240, torch.device("cuda"))
    assert TRITON_DECODE_MM.requirements.unmet(layer).startswith("needs scales of columns in multiples of 16, found ")


def test_zero_points_of_4_bit_integers_are_taken_away():
    generator = torch.Generator().manual_seed(3)
    words = {"dtype": torch.int32, "generator": generator}
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31, (16, 24), **words),
        "qzeros": torch.randint(-(2**31), 2**31, (2, 3), **words),
        "scales": torch.rand(2, 24, generator=generator).half(),
    }
    fmt = PackedInt4(64)
    decoded = fused(torch.eye(128), tensors, fmt, None)
    assert torch.equal(decoded.t(), fmt.dequantize(tensors))


def test_every_e2m1_and_e4m3_code_is_decoded():
    packed = torch.arange(256, dtype=torch.uint8).view(1, -1)
    e4m3 = torch.arange(256, dtype=torch.uint8)
    e4m3 = torch.where(e4m3 & 0x7F == 0x7F, 0, e4m3).to(torch.uint8).view(1, -1).view(torch.float8_e4m3fn)
    for fmt, weight, columns in ((Mxfp4(), packed, 512), (Mxfp8(), e4m3, 256)):
        tensors = {"weight": weight, "weight_scale": torch.full((1, columns // 32), 126, dtype=torch.uint8)}
        decoded = fused(torch.eye(columns), tensors, fmt, None)
        assert torch.equal(decoded.flatten(), fmt.dequantize(disk_tensors(fmt, tensors, columns)).flatten())
