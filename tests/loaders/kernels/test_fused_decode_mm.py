"""The GEMM that decodes inside is exact up to float32 sums and one rounding; interpreted where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.mxfp8 import Mxfp8
from omni_convert.formats.nvfp4 import Nvfp4
from omni_convert.loaders.kernels.fused_decode_mm import TRITON_DECODE_MM, run_fused
from omni_convert.loaders.kernels.kernel import LayerTraits
from omni_convert.loaders.kernels.reference import rounded_input
from omni_convert.loaders.kernels.table import KERNELS
from omni_convert.loaders.resident import disk_tensors, resident_tensors

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot run")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    pytest.param(Mxfp4(), id="mxfp4"),
    pytest.param(Mxfp8(), id="mxfp8"),
    pytest.param(Nvfp4(), id="nvfp4"),
]
# (M, N, K): one row, neither a multiple of a tile, every size of tile, several tiles each way
SHAPES = [(1, 24, 64), (5, 33, 96), (16, 70, 192), (40, 72, 160), (150, 136, 320)]


def make(fmt, outputs: int, columns: int, magnitude: float = 0.05):
    """Tensors on disk and in memory of random weights whose rows differ in size."""
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, columns, generator=generator) * magnitude
    stored = fmt.quantize(weight * torch.logspace(-2, 1, outputs)[:, None])
    return stored, resident_tensors(fmt, stored)


def fused(x, tensors, fmt, bias, is_rounded=False):
    placed = {suffix: tensor.to(DEVICE) for suffix, tensor in tensors.items()}
    return run_fused(x.to(DEVICE), placed, fmt, None if bias is None else bias.to(DEVICE), is_rounded).cpu()


def exact(x, stored, fmt, bias):
    """The product in float64, and what the terms of each sum add up to without their signs."""
    weight = fmt.dequantize(stored).double()
    bias = torch.zeros(1) if bias is None else bias
    return x.double() @ weight.t() + bias.double(), x.double().abs() @ weight.abs().t() + bias.double().abs()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_exact_up_to_float32_sums(fmt, shape, has_bias):
    rows, outputs, columns = shape
    stored, tensors = make(fmt, outputs, columns)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)) if has_bias else None
    product, terms = exact(x, stored, fmt, bias)
    out = fused(x, tensors, fmt, bias)
    assert out.dtype is torch.float32
    assert ((out.double() - product).abs() <= columns * 2**-24 * terms).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_bfloat16_comes_out_as_it_went_in_and_rounds_once_more(fmt, is_rounded):
    stored, tensors = make(fmt, 40, 96)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    # without input_scale, nvfp4 inputs are left alone; rounded mxfp4 and mxfp8 inputs fit bfloat16
    inputs = rounded_input(x, tensors, fmt) if is_rounded else x
    product, terms = exact(inputs, stored, fmt, None)
    out = fused(x, tensors, fmt, None, is_rounded)
    assert out.dtype is torch.bfloat16
    rounding = 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter cuts off where devices round
    assert ((out.double() - product).abs() <= rounding * product.abs() + 96 * 2**-24 * terms).all()


def test_it_runs_on_cuda_devices_only_and_only_when_asked_for():
    names = [kernel.name for kernel in KERNELS]
    assert names.index("decode_mm") < names.index("triton_decode_mm")
    assert names.index("decode_weight_mm") < names.index("triton_decode_weight_mm")
    layer = LayerTraits(Mxfp4(), 64, 128, torch.device("cpu"))
    assert TRITON_DECODE_MM.requirements.unmet(layer) == "runs on cuda, not on cpu"


@pytest.mark.parametrize("fmt", FORMATS)
def test_torch_compile_takes_it_without_a_graph_break(fmt):
    _, tensors = make(fmt, 40, 96)
    x = torch.randn(3, 96).bfloat16()
    compiled = torch.compile(lambda x: fused(x, tensors, fmt, None), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fused(x, tensors, fmt, None))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_weights_far_from_one_are_decoded_all_the_same(fmt, magnitude):
    stored, tensors = make(fmt, 40, 96, magnitude)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    product, terms = exact(x, stored, fmt, None)
    out = fused(x, tensors, fmt, None)
    assert out.dtype is torch.float32
    assert ((out.double() - product).abs() <= 96 * 2**-24 * terms).all()


def test_every_e2m1_and_e4m3_code_is_decoded():
    packed = torch.arange(256, dtype=torch.uint8).view(1, -1)
    e4m3 = torch.arange(256, dtype=torch.uint8)
    e4m3 = torch.where(e4m3 & 0x7F == 0x7F, 0, e4m3).to(torch.uint8).view(1, -1).view(torch.float8_e4m3fn)
    for fmt, weight, columns in ((Mxfp4(), packed, 512), (Mxfp8(), e4m3, 256)):
        tensors = {"weight": weight, "weight_scale": torch.full((1, columns // 32), 126, dtype=torch.uint8)}
        decoded = fused(torch.eye(columns), tensors, fmt, None)
        assert torch.equal(decoded.flatten(), fmt.dequantize(disk_tensors(fmt, tensors, columns)).flatten())


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from omni_convert.loaders.kernels.triton_mm import TILES, decode_mm_kernel

types = {"weight_ptr": "*u8", "scale_ptr": "*u8", "unit_ptr": "*fp32", "x_ptr": "*bf16", "bias_ptr": "*bf16"}
aligned = {(index,): [["tt.divisibility", 16]] for index in range(11)}
for capability, instruction in ((80, "mma.sync"), (90, "mma")):
    for is_e2m1, block in ((True, 32), (True, 16), (False, 32)):
        for _, tile in TILES:
            constants = {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "STEP": tile.step, "BLOCK": block, "IN_CACHE": 8}
            constants |= {"IS_E2M1": is_e2m1, "IS_E8M0": block == 32, "IS_INTERPRETED": False}
            signature = {**dict.fromkeys(decode_mm_kernel.arg_names, "i32"), "out_ptr": "*bf16", **types}
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(decode_mm_kernel, signature, constants, aligned)
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert instruction in compiled.asm["ptx"], (capability, tile)
            assert compiled.metadata.shared <= 99 * 1024, (capability, tile, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_every_tile_compiles_into_tensor_core_instructions_and_fits_shared_memory(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
