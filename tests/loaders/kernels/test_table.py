"""The table picks the fastest kernel that accepts a layer, and every kernel computes what the reference does."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from omni_convert.formats.errors import KernelError
from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import Fp8, Fp8Block
from omni_convert.formats.int8 import Int8
from omni_convert.loaders.kernels.kernel import Kernel, LayerTraits, Requirements
from omni_convert.loaders.kernels.reference import REFERENCE
from omni_convert.loaders.kernels.table import KERNELS, select_kernel

CPU = torch.device("cpu")
DEVICES = [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]
FORMATS = {"fp8": Fp8(), "fp8 static": Fp8(static=True), "fp8 block": Fp8Block((32, 48)), "int8": Int8()}
# Kernels whose results pass through bf16 may differ by one rounding of each element: 2^-9 at most, relatively.
TOLERANCE = 2**-9


def make_layer(fmt: Format, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    if isinstance(fmt, Fp8) and fmt.static:
        return Fp8().quantize(weight) | {"input_scale": torch.tensor(4.0 / 448)}
    return fmt.quantize(weight)


def accepting(fmt: Format, device: torch.device) -> list[Kernel]:
    layer = LayerTraits(fmt, 64, 96, device)
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
    tensors = make_layer(fmt, 64, 96)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 96, generator=generator).to(dtype)
    bias = torch.randn(64, generator=generator).to(dtype)
    expected = REFERENCE.run(x, tensors, fmt, bias)
    on_device = {suffix: tensor.to(device) for suffix, tensor in tensors.items()}
    out = kernel.run(x.to(device), on_device, fmt, bias.to(device)).cpu()
    assert out.dtype is dtype
    assert out.shape == (rows, 64)
    assert (out.float() - expected.float()).norm() <= TOLERANCE * expected.float().norm()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_reference_is_close_to_the_unquantized_layer(fmt):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(160)).bfloat16()
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = nn.functional.linear(x.float(), weight.float())
    out = REFERENCE.run(x, make_layer(fmt, 64, 96), fmt, None)
    error = (out.float() - exact).norm() / exact.norm()
    assert error < (0.015 if isinstance(fmt, Int8) else 0.05)


@pytest.mark.parametrize(
    ("fmt", "name"),
    [(Fp8(), "scaled_mm"), (Fp8(static=True), "scaled_mm"), (Int8(), "int_mm"), (Fp8Block(), "reference")],
    ids=str,
)
def test_the_cpu_runs_a_scaled_gemm_where_torch_has_one(fmt, name):
    assert select_kernel(LayerTraits(fmt, 64, 96, CPU)).kernel.name == name


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_bf16_activations_leave_the_input_alone(fmt):
    selection = select_kernel(LayerTraits(fmt, 64, 96, CPU, "bf16"))
    assert selection.kernel.name == "weight_only"
    tensors = make_layer(fmt, 64, 96)
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = nn.functional.linear(x, fmt.dequantize(tensors).bfloat16())
    assert torch.equal(selection.kernel.run(x, tensors, fmt, None), expected)


def test_a_selection_tells_what_each_faster_kernel_for_the_format_lacked():
    selection = select_kernel(LayerTraits(Fp8(), 64, 96, CPU, "bf16"))
    assert selection.reason == "scaled_mm runs quantized activations, not bf16"
    assert select_kernel(LayerTraits(Fp8(), 64, 96, CPU)).reason == "fastest"
    assert select_kernel(LayerTraits(Fp8Block(), 64, 96, CPU)).reason == "no scaled GEMM for this format"


def test_no_kernel_is_an_error_that_lists_every_reason():
    layer = LayerTraits(Int8(), 64, 96, torch.device("meta"))
    needs_cuda = replace(REFERENCE, requirements=Requirements((Int8,), devices=("cuda",)))
    other_format = replace(REFERENCE, name="other", requirements=Requirements((Fp8,)))
    with pytest.raises(KernelError, match=r"int8 64 x 96 on meta.*reference runs on cuda.*other runs Fp8, not Int8"):
        select_kernel(layer, (needs_cuda, other_format))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_scaled_gemms_on_cuda_state_their_shape_limits(kernel):
    if kernel.is_scaled_gemm:
        assert kernel.requirements.capability is not None
        assert kernel.requirements.multiple_of in (8, 16)
