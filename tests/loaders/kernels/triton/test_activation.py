"""The fused kernels give, bit for bit, what `input_codes.py` gives: in Triton's interpreter, where there is no GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from omni_convert.formats.arithmetic import input_codes
from omni_convert.loaders.kernels import fused_activation
from omni_convert.loaders.kernels.fused_activation import LONGEST_ROW, fp8_per_token_op, int8_per_token_op

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot run")

# The interpreter's numpy says so of values that saturate.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = torch.tensor(0.0123)


def static(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (fused_activation.fp8_static_op(x, SCALE.to(x.device)),)


def per_group(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return fused_activation.fp8_per_group_op(x, 128)


def nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return fused_activation.nvfp4_swizzled_op(x, SCALE.to(x.device))


# Each kernel, and what `fused_activation.py` computes on a device without kernels.
PER_TOKEN = [
    pytest.param(fp8_per_token_op, input_codes.fp8_per_token, id="fp8"),
    pytest.param(int8_per_token_op, input_codes.int8_per_token, id="int8"),
]
PAIRS = [
    *PER_TOKEN,
    pytest.param(static, lambda x: (fused_activation.fp8_static(x, SCALE),), id="fp8 static"),
    pytest.param(per_group, lambda x: fused_activation.fp8_per_group(x, 128), id="fp8 group"),
    pytest.param(fused_activation.mxfp8_swizzled_op, fused_activation.mxfp8_swizzled, id="mxfp8"),
    pytest.param(nvfp4, lambda x: fused_activation.nvfp4_swizzled(x, SCALE), id="nvfp4"),
]


def rows(columns: int, dtype: torch.dtype, count: int = 8) -> torch.Tensor:
    """Tokens of every magnitude, a zero one, one of a single large value and ones of ties."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(count, columns, generator=generator)
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
    found, expected = (tensor.cpu().clone(memory_format=torch.contiguous_format) for tensor in (fused, expected))
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("fused", "plain"), PER_TOKEN)
@pytest.mark.parametrize("columns", [1, 7, 96, 3072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_and_scales_of_a_token_are_those_of_plain_torch(fused, plain, columns, dtype):
    x = rows(columns, dtype)
    (codes, scale), (expected_codes, expected_scale) = fused(x.to(DEVICE)), plain(x)
    assert same_bits(scale, expected_scale)
    assert same_bits(codes, expected_codes)


@pytest.mark.parametrize(("fused", "plain"), PAIRS[2:])
@pytest.mark.parametrize("shape", [(8, 32), (13, 192), (8, 1056), (140, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_and_scales_of_blocks_are_those_of_plain_torch_with_the_filling(fused, plain, shape, dtype):
    count, columns = shape
    x = rows(columns, dtype, count)
    for found, expected in zip(fused(x.to(DEVICE)), plain(x), strict=True):
        assert found.shape == expected.shape
        assert same_bits(found, expected)


@pytest.mark.parametrize(("fused", "plain"), PAIRS)
def test_rows_may_lie_apart_or_across(fused, plain):
    x = rows(64, torch.bfloat16, 32)
    for view in (x[::2, 16:48], x.t()):
        assert same_bits(fused(view.to(DEVICE))[0], plain(view)[0])


@pytest.mark.parametrize(("fused", "plain"), PAIRS)
def test_no_rows_give_no_codes(fused, plain):
    empty = torch.zeros(0, 64)
    for found, expected in zip(fused(empty.to(DEVICE)), plain(empty), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_scales_of_groups_lie_token_by_token():
    assert per_group(torch.ones(5, 384, device=DEVICE))[1].stride() == (1, 5)
    assert fused_activation.fp8_per_group(torch.ones(5, 384), 128)[1].stride() == (1, 5)


def test_a_block_that_is_not_finite_is_not_in_the_result():
    x = torch.ones(3, 64)
    x[0, 3], x[1, 40] = torch.nan, torch.inf
    for fused, plain in ((param.values[0], param.values[1]) for param in PAIRS[4:]):
        found, expected = fused(x.to(DEVICE))[1], plain(x)[1]
        assert same_bits(found, expected)
        assert (found.cpu().view(torch.uint8) & 0x7F == 0x7F).any()


def test_a_division_in_three_steps_is_correctly_rounded():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 16, generator=generator)
    scale = torch.rand(64, 1, generator=generator).add(1) * torch.exp2(torch.arange(64.0) - 20)[:, None]
    inverse = 1.0 / scale.double()
    inverse = inverse.float().double()
    product = (values.double() * inverse).float().double()
    rest = (product * scale.double() - values.double()).float().double()
    quotient = (product - rest * inverse).float()
    assert torch.equal(quotient, values / scale)


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


def test_the_operators_are_well_formed():
    x, scale = rows(128, torch.bfloat16).to(DEVICE), SCALE.to(DEVICE)
    for operator in (fp8_per_token_op, int8_per_token_op, fused_activation.mxfp8_swizzled_op):
        torch.library.opcheck(operator, (x,))
    torch.library.opcheck(fused_activation.fp8_per_group_op, (x, 128))
    for operator in (fused_activation.fp8_static_op, fused_activation.nvfp4_swizzled_op):
        torch.library.opcheck(operator, (x, scale))


@pytest.mark.parametrize("name", ["fp8_per_token", "int8_per_token"])
def test_cuda_takes_them_for_rows_that_fit(monkeypatch, name):
    seen = []
    monkeypatch.setattr(fused_activation, f"{name}_op", lambda x: seen.append(x.shape) or (x, x))
    with FakeTensorMode():
        for columns in (96, LONGEST_ROW, LONGEST_ROW + 1):
            getattr(fused_activation, name)(torch.empty(4, columns, device="cuda"))
    getattr(fused_activation, name)(torch.ones(4, 96))
    assert seen == [(4, 96), (4, LONGEST_ROW)]
