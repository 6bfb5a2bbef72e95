"""The table picks the fastest kernel that accepts a layer, and every kernel computes what the reference does."""

from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from omni_convert.formats.arithmetic.input_values import quantize_mxfp4_dualscale_input
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_LARGEST
from omni_convert.formats.errors import KernelError
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.schemes.int8 import Int8, RotatedInt8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders.kernels import decode_mm, int_mm
from omni_convert.loaders.kernels.decode_mm import DECODE_MM
from omni_convert.loaders.kernels.int_mm import INT_MM
from omni_convert.loaders.kernels.kernel import Kernel, LayerTraits, Requirements
from omni_convert.loaders.kernels.mx_scaled_mm import NVFP4_SCALED_MM
from omni_convert.loaders.kernels.npu import NPU_MXFP4, NPU_MXFP4_DUALSCALE, NPU_MXFP8
from omni_convert.loaders.kernels.reference import REFERENCE, WEIGHT_ONLY
from omni_convert.loaders.kernels.table import KERNELS, OVERRIDE, select_kernel
from omni_convert.loaders.memory.layout import disk_tensors, memory_tensors
from omni_convert.loaders.memory.packed_int4 import PackedInt4

CPU = torch.device("cpu")
DEVICES = [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]
FORMATS = {
    "fp8": Fp8(),
    "fp8 static": Fp8(static=True),
    "fp8 row": Fp8Channel(),
    "fp8 block": Fp8Block((32, 48)),
    "int8": Int8(),
    "int8 rotated": RotatedInt8(16),
    "mxfp8": Mxfp8(),
    "mxfp4": Mxfp4(),
    "mxfp4 smooth": Mxfp4(smooth=True),
    "mxfp4_dualscale": Mxfp4DualScale(),
    "nvfp4": Nvfp4(),
    "nvfp4 static": Nvfp4(static=True),
    "w4a16": PackedInt4(64),
}
# Rounding to bf16 changes a number by 2^-8 at most, relatively, and by half of that on average. Results that pass
# through bf16 are rounded once; decoding also rounds inputs times scales, and for two formats the scales of weights.
ROUNDING = 2**-8


def tolerance(fmt: Format) -> float:
    return 2 * ROUNDING if isinstance(fmt, Fp8Block | Mxfp4DualScale) else ROUNDING


def make_layer(fmt: Format, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    """Tensors as in memory, with a mul_scale that is not all ones."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    smoothing = torch.rand(in_features, generator=generator).add(0.5).bfloat16().float()
    if getattr(fmt, "static", False):
        largest = NVFP4_LARGEST if isinstance(fmt, Nvfp4) else 448
        return type(fmt)().quantize(weight) | {"input_scale": torch.tensor(4.0 / largest)}
    if "mul_scale" in fmt.layout(out_features, in_features):
        return memory_tensors(fmt, fmt.quantize(weight.float() / smoothing) | {"mul_scale": smoothing})
    return memory_tensors(fmt, fmt.quantize(weight))


def accepting(fmt: Format, device: torch.device) -> list[Kernel]:
    layer = LayerTraits(fmt, 64, 128, device)
    return [kernel for kernel in KERNELS if kernel.requirements.unmet(layer) is None]


CASES = [
    pytest.param(fmt, kernel, device, id=f"{name} {kernel.name} {device}")
    for device in DEVICES
    for name, fmt in FORMATS.items()
    for kernel in accepting(fmt, device)
    if (kernel, device) != (REFERENCE, CPU)
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize(("fmt", "kernel", "device"), CASES)
def test_kernels_agree_with_the_definition(fmt, kernel, device, rows, dtype):
    tensors = make_layer(fmt, 64, 128)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 128, generator=generator).to(dtype)
    bias = torch.randn(64, generator=generator).to(dtype)
    expected = REFERENCE.run(x, tensors, fmt, bias)
    on_device = {suffix: tensor.to(device) for suffix, tensor in tensors.items()}
    out = kernel.run(x.to(device), on_device, fmt, bias.to(device)).cpu()
    assert out.dtype is dtype
    assert out.shape == (rows, 64)
    assert (out.float() - expected.float()).norm() <= tolerance(fmt) * expected.float().norm()


@pytest.mark.parametrize("name", ["fp8", "fp8 block", "mxfp8", "mxfp4", "mxfp4 smooth"])
@pytest.mark.parametrize("in_features", [1, 33, 100])
def test_decoding_kernels_take_widths_that_are_no_multiple_of_a_block(name, in_features):
    fmt = FORMATS[name]
    tensors = make_layer(fmt, 5, in_features)
    x = torch.randn(3, in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = REFERENCE.run(x, tensors, fmt, None).float()
    assert (DECODE_MM.run(x, tensors, fmt, None).float() - expected).norm() <= tolerance(fmt) * expected.norm()


def test_a_weight_of_many_chunks_and_tiles_is_put_together_in_order(monkeypatch):
    monkeypatch.setattr(decode_mm, "CPU_TILE", 3 * 128)
    monkeypatch.setattr(decode_mm, "CPU_CHUNK", 7 * 128)
    for fmt in FORMATS.values():
        tensors = make_layer(fmt, 64, 128)
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        bias = torch.arange(64).bfloat16()
        out = DECODE_MM.run(x, tensors, fmt, bias)
        monkeypatch.setattr(decode_mm, "CPU_CHUNK", 1 << 20)
        assert torch.allclose(DECODE_MM.run(x, tensors, fmt, bias).float(), out.float(), rtol=2**-7)


ERRORS = {Int8: 0.015, Mxfp4: 0.18, Mxfp4DualScale: 0.17, Nvfp4: 0.14, PackedInt4: 0.14}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_reference_is_close_to_the_unquantized_layer(fmt):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(192)).bfloat16()
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = nn.functional.linear(x.float(), weight.float())
    out = REFERENCE.run(x, make_layer(fmt, 64, 128), fmt, None)
    error = (out.float() - exact).norm() / exact.norm()
    assert error < ERRORS.get(type(fmt), 0.05)


def test_the_reference_rounds_inputs_as_the_runtime_and_multiplies_what_it_stored():
    fmt = FORMATS["mxfp4_dualscale"]
    tensors = make_layer(fmt, 64, 128)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    smoothed = x * tensors["mul_scale"].bfloat16()
    weight = fmt.dequantize(disk_tensors(fmt, tensors, 128)) / tensors["mul_scale"]
    expected = quantize_mxfp4_dualscale_input(smoothed) @ weight.t()
    assert torch.allclose(REFERENCE.run(x, tensors, fmt, None).float(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kernel", "scaled"),
    [
        ("fp8", "cpu_decode_mm", "scaled_mm"),
        ("fp8 static", "cpu_decode_mm", "scaled_mm"),
        ("int8", "int_mm", "int_mm"),
        ("int8 rotated", "int_mm", "int_mm"),
        ("fp8 block", "cpu_decode_mm", None),
        ("mxfp8", "cpu_decode_mm", None),
        ("mxfp4_dualscale", "cpu_decode_mm", None),
        ("nvfp4 static", "cpu_decode_mm", None),
        ("w4a16", "cpu_decode_mm", None),
    ],
)
def test_the_cpu_runs_the_fastest_kernel_and_a_scaled_gemm_if_asked_to(name, kernel, scaled):
    layer = LayerTraits(FORMATS[name], 64, 128, CPU)
    assert select_kernel(layer).kernel.name == kernel
    preferred = select_kernel(layer, prefer_scaled_gemm=True).kernel
    assert (preferred.name if preferred.is_scaled_gemm else None) == scaled


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_bf16_activations_leave_the_input_alone(fmt):
    selection = select_kernel(LayerTraits(fmt, 64, 128, CPU, "bf16"))
    assert selection.kernel.name == "decode_weight_mm"
    tensors = make_layer(fmt, 64, 128)
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = nn.functional.linear(x.float(), fmt.dequantize(disk_tensors(fmt, tensors, 128)))
    for kernel in (selection.kernel, WEIGHT_ONLY):
        assert (kernel.run(x, tensors, fmt, None) - expected).norm() <= 2**-8 * expected.norm()


def test_a_selection_tells_why_no_scaled_gemm_runs():
    assert select_kernel(LayerTraits(Int8(), 64, 128, CPU)).reason == "the fastest scaled GEMM"
    assert select_kernel(LayerTraits(Fp8(), 64, 128, CPU)).reason == "scaled_mm is slower here"
    weights_alone = select_kernel(LayerTraits(Fp8(), 64, 128, CPU, "bf16"))
    assert weights_alone.reason == "scaled_mm runs quantized activations, not bf16"
    assert select_kernel(LayerTraits(Fp8Channel(), 64, 128, CPU)).reason == "scaled_mm is slower here"
    assert select_kernel(LayerTraits(Fp8Block(), 64, 128, CPU)).reason == "block_scaled_mm runs on cuda, not on cpu"
    assert select_kernel(LayerTraits(Fp8(), 64, 128, CPU), (DECODE_MM,)).reason == "no scaled GEMM for this format"
    reason = select_kernel(LayerTraits(Mxfp8(), 64, 128, CPU)).reason
    assert reason == "mxfp8_scaled_mm runs on cuda, not on cpu; npu_mxfp8 runs on npu, not on cpu"


@pytest.mark.parametrize("fmt", [Fp8(), Fp8Channel()], ids=lambda fmt: fmt.label)
def test_a_gpu_without_float8_is_told_what_it_lacks(fmt: Format, monkeypatch: pytest.MonkeyPatch):
    layer = LayerTraits(fmt, 64, 128, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    selection = select_kernel(layer)
    assert not selection.kernel.is_scaled_gemm
    assert selection.reason == "scaled_mm needs compute capability 8.9, found 8.6"
    monkeypatch.setenv(OVERRIDE, "scaled_mm")
    with pytest.raises(KernelError, match=rf"scaled_mm cannot run {fmt.label} 64 x 128 on cuda .*8.9, found 8.6"):
        select_kernel(layer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert select_kernel(layer).kernel.name == "scaled_mm"
    with pytest.raises(KernelError, match="needs features divisible by 16, found 40 x 128"):
        select_kernel(replace(layer, out_features=40))


def test_weights_without_input_scale_have_no_scaled_gemm_on_any_device():
    layer = LayerTraits(Nvfp4(), 64, 128, torch.device("cuda"))
    assert NVFP4_SCALED_MM.requirements.unmet(layer) == "needs input_scale, the layer stores none"


@pytest.mark.parametrize("kernel", [NPU_MXFP8, NPU_MXFP4, NPU_MXFP4_DUALSCALE], ids=lambda kernel: kernel.name)
def test_npu_kernels_need_torch_npu(kernel):
    (format_class,) = kernel.requirements.formats
    reason = kernel.requirements.unmet(LayerTraits(format_class(), 64, 128, SimpleNamespace(type="npu")))
    assert reason == (None if find_spec("torch_npu") else "needs torch_npu")


def test_no_kernel_is_an_error_that_lists_every_reason():
    layer = LayerTraits(Int8(), 64, 96, torch.device("meta"))
    needs_cuda = replace(REFERENCE, requirements=Requirements((Int8,), devices=("cuda",)))
    other_format = replace(REFERENCE, name="other", requirements=Requirements((Fp8,)))
    with pytest.raises(KernelError, match=r"int8 64 x 96 on meta.*reference runs on cuda.*other runs Fp8, not Int8"):
        select_kernel(layer, (needs_cuda, other_format))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_scaled_gemms_on_cuda_state_their_shape_limits(kernel):
    if kernel.is_scaled_gemm and "cuda" in kernel.requirements.devices:
        assert kernel.requirements.capability is not None
        assert kernel.requirements.multiple_of in (8, 16, 32, 128)


def test_the_environment_can_name_the_kernel(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "reference")
    selection = select_kernel(LayerTraits(Int8(), 64, 128, CPU))
    assert selection.kernel is REFERENCE
    assert selection.reason == "OMNI_CONVERT_KERNEL says so"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mxfp8_scaled_mm", r"mxfp8_scaled_mm cannot run int8 64 x 128 on cpu.*it runs Mxfp8, not Int8; unset"),
        ("typo", "found 'typo', expected one of cpu_decode_mm, scaled_mm"),
    ],
)
def test_a_named_kernel_that_cannot_run_is_an_error(monkeypatch, name, message):
    monkeypatch.setenv(OVERRIDE, name)
    with pytest.raises(KernelError, match=rf"OMNI_CONVERT_KERNEL: {message}"):
        select_kernel(LayerTraits(Int8(), 64, 128, CPU))


def test_kernels_for_nvidia_decline_an_amd_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for fmt, name in ((Fp8(), "scaled_mm"), (Int8(), "int_mm"), (Mxfp4(), "triton_decode_mm")):
        layer = LayerTraits(fmt, 64, 64, torch.device("cuda"))
        declined = {kernel.name: kernel.requirements.unmet(layer) for kernel in KERNELS}
        assert declined[name] in ("needs an NVIDIA GPU", "needs triton")
        assert declined["reference"] is None


@pytest.mark.parametrize("bias", [None, torch.arange(53.0)])
def test_tiles_of_the_int8_gemm_change_nothing(bias: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch):
    tensors = make_layer(Int8(), 53, 64)
    x = torch.randn(19, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = INT_MM.run(x, tensors, Int8(), bias)
    monkeypatch.setattr(int_mm, "CPU_QUANTIZED", 3 * 64)
    monkeypatch.setattr(int_mm, "CPU_CODES", 7 * 64)
    monkeypatch.setattr(int_mm, "CPU_PRODUCTS", 7 * 24)
    assert torch.equal(INT_MM.run(x, tensors, Int8(), bias), whole)
