"""The fused kernels give, bit for bit, what `activation.py` gives: in Triton's interpreter, where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from omni_convert.loaders.kernels import activation, fused_activation
from omni_convert.loaders.kernels.fused_activation import LONGEST_ROW, fp8_per_token_op, int8_per_token_op

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot run")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = [
    pytest.param(fp8_per_token_op, activation.fp8_per_token, id="fp8"),
    pytest.param(int8_per_token_op, activation.int8_per_token, id="int8"),
]


def rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of every magnitude, a zero one, one of a single large value and one of ties."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(8, columns, generator=generator)
    x[1] *= 2.0**-15 if dtype is torch.float16 else 1e-30
    x[2] *= 1e4 if dtype is torch.float16 else 1e37
    x[3] = 0
    x[4] *= 1e-4
    x[4, 0] = 3e4
    x[5] = torch.randint(-254, 255, (columns,), generator=generator) / 2  # halves of INT8 steps
    x[5, 0] = 127
    if dtype is torch.float32:  # the interpreter gets subnormal numbers of other dtypes wrong
        x[7] *= 1e-37  # its inverse would be infinite
    x[6] = torch.linspace(-448, 448, columns)
    return x.to(dtype)


def same_bits(fused: torch.Tensor, expected: torch.Tensor) -> bool:
    return fused.dtype == expected.dtype and torch.equal(fused.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("fused", "plain"), PAIRS)
@pytest.mark.parametrize("columns", [1, 7, 96, 3072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_and_scales_are_those_of_plain_torch(fused, plain, columns, dtype):
    x = rows(columns, dtype)
    (codes, scale), (expected_codes, expected_scale) = fused(x.to(DEVICE)), plain(x)
    assert same_bits(scale, expected_scale)
    assert same_bits(codes, expected_codes)


@pytest.mark.parametrize(("fused", "plain"), PAIRS)
def test_rows_may_lie_apart_or_across(fused, plain):
    x = rows(64, torch.bfloat16)
    for view in (x[::2, 5:40], x.t()):
        assert same_bits(fused(view.to(DEVICE))[0], plain(view)[0])


@pytest.mark.parametrize(("fused", "plain"), PAIRS)
def test_no_rows_give_no_codes(fused, plain):
    codes, scale = fused(torch.zeros(0, 64, device=DEVICE))
    assert (codes.shape, scale.shape) == ((0, 64), (0, 1))


def test_nan_reaches_the_result():
    x = torch.ones(2, 40)
    x[0, 3] = torch.nan
    codes, scale = fp8_per_token_op(x.to(DEVICE))
    assert codes[0].float().isnan().all()
    assert not codes[1].float().isnan().any()
    assert scale.flatten().isnan().tolist() == [True, False]
    assert int8_per_token_op(x.to(DEVICE))[1].flatten().isnan().tolist() == [True, False]


@pytest.mark.parametrize(("fused", "plain"), PAIRS)
def test_torch_compile_takes_them_as_one_operator_whatever_the_number_of_rows(fused, plain):
    compiled = torch.compile(lambda x: fused(x * 2), fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (3, 8):
        x = rows(96, torch.bfloat16)[:count]
        assert same_bits(compiled(x.to(DEVICE))[0], plain(x * 2)[0])


@pytest.mark.parametrize(("fused", "plain"), PAIRS)
def test_the_operators_are_well_formed(fused, plain):
    torch.library.opcheck(fused, (rows(96, torch.bfloat16).to(DEVICE),))


@pytest.mark.parametrize("name", ["fp8_per_token", "int8_per_token"])
def test_cuda_takes_them_for_rows_that_fit(monkeypatch, name):
    seen = []
    monkeypatch.setattr(fused_activation, f"{name}_op", lambda x: seen.append(x.shape) or (x, x))
    with FakeTensorMode():
        for columns in (96, LONGEST_ROW, LONGEST_ROW + 1):
            getattr(fused_activation, name)(torch.empty(4, columns, device="cuda"))
    getattr(fused_activation, name)(torch.ones(4, 96))
    assert seen == [(4, 96), (4, LONGEST_ROW)]


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from omni_convert.loaders.kernels.triton_activation import fp8_kernel, int8_kernel

types = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "stride": "i32", "columns": "i32"}
aligned = {(index,): [["tt.divisibility", 16]] for index in range(5)}
for capability in (80, 90, 100):
    for kernel, codes, constants in (
        (fp8_kernel, "*u8", {"LARGEST": 448.0, "SMALLEST_SCALE": 1e-6, "BLOCK": 4096}),
        (int8_kernel, "*i8", {"LARGEST": 127.0, "BLOCK": 4096}),
    ):
        signature = {**types, "codes_ptr": codes, **dict.fromkeys(constants, "constexpr")}
        signature = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": 4, "enable_fp_fusion": False}
        ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        assert "ld.global.v4" in ptx and "fma" not in ptx and "div.full" not in ptx, ptx
"""


@pytest.mark.slow
def test_they_compile_for_gpus_into_wide_loads_and_exact_arithmetic(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
