"""Error-compensating rounding: worth a lot on correlated inputs, the same as nearest rounding on uncorrelated ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_convert.convert.calibration.gptq import Compensation, plan_compensation, quantize_compensated
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorRows
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block
from omni_convert.formats.schemes.gguf import Gguf
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4

COLUMNS = 192  # no multiple of the columns of a lazy update, nor of a block of 512
FORMATS = [
    Fp8(),
    Fp8Block((48, 80)),
    Int8(),
    Int8(shared_in_group=True),
    Mxfp8(),
    Mxfp4(),
    Mxfp4(scale_rule="msmodelslim"),
    Mxfp4DualScale(),
    Nvfp4(),
    *map(Gguf, ("Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "IQ4_NL")),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.label}-{FORMATS.index(fmt)}")


def weight(rows: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)).bfloat16()


def correlated_inputs(samples: int, seed: int = 1) -> Tensor:
    """Inputs whose energy lies in few directions, and whose channels differ, as those of real layers."""
    generator = torch.Generator().manual_seed(99)
    directions = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator)).Q
    loudness = torch.exp(torch.randn(COLUMNS, generator=generator) * 0.5)
    latent = torch.randn(samples, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return ((latent / torch.arange(1, COLUMNS + 1)) @ directions.T * loudness).bfloat16()


def moments_of(inputs: Tensor) -> Tensor:
    return inputs.float().T @ inputs.float()


def fitted_to(fmt: Format, rows: Tensor, mul_scale: Tensor | None = None) -> tuple[object, dict[str, Tensor]]:
    fitted = fmt.fit([TensorRows(rows)], None) if mul_scale is None else mul_scale
    return fitted, fmt.constants(fitted)


def output_error(fmt: Format, tensors: dict[str, Tensor], rows: Tensor, inputs: Tensor) -> float:
    difference = inputs.float() @ (fmt.dequantize(tensors) - rows.float()).T
    return float(difference.double().square().sum())


@every_format
def test_it_takes_most_of_the_output_error_of_correlated_inputs(fmt: Format) -> None:
    rows, inputs, unseen = weight(), correlated_inputs(2048), correlated_inputs(512, seed=2)
    fitted, constants = fitted_to(fmt, rows)
    plan = plan_compensation([moments_of(inputs)])
    compensated = quantize_compensated(rows, plan, fmt, fitted, constants) | constants
    nearest = fmt.quantize_rows(rows, fitted) | constants
    assert output_error(fmt, compensated, rows, unseen) < 0.2 * output_error(fmt, nearest, rows, unseen)


@every_format
def test_uncorrelated_inputs_give_nearest_rounding(fmt: Format) -> None:
    rows = weight()
    fitted, constants = fitted_to(fmt, rows)
    plan = plan_compensation([torch.eye(COLUMNS)])
    nearest = fmt.dequantize(fmt.quantize_rows(rows, fitted) | constants)
    compensated = fmt.dequantize(quantize_compensated(rows, plan, fmt, fitted, constants) | constants)
    differing = nearest != compensated
    # Int8 multiplies with the inverse of its scale where this divides: what lies on a tie may fall either way.
    assert differing.float().mean() < 1e-3
    error, other_error = ((values - rows.float())[differing].abs() for values in (nearest, compensated))
    torch.testing.assert_close(error, other_error, rtol=1e-4, atol=0)


@every_format
def test_the_scales_and_the_layout_are_those_of_nearest_rounding(fmt: Format) -> None:
    rows = weight()
    fitted, constants = fitted_to(fmt, rows)
    plan = plan_compensation([moments_of(correlated_inputs(512))])
    nearest = fmt.quantize_rows(rows, fitted)
    compensated = quantize_compensated(rows, plan, fmt, fitted, constants)
    assert compensated.keys() == nearest.keys()
    for suffix, tensor in nearest.items():
        assert compensated[suffix].dtype == tensor.dtype
        assert compensated[suffix].shape == tensor.shape
        assert suffix == "weight" or torch.equal(compensated[suffix], tensor)


@every_format
def test_rows_are_independent_and_the_result_is_determined(fmt: Format) -> None:
    rows = weight()
    fitted, constants = fitted_to(fmt, rows)
    plan = plan_compensation([moments_of(correlated_inputs(512))])
    whole = quantize_compensated(rows, plan, fmt, fitted, constants)["weight"]
    again = quantize_compensated(rows, plan, fmt, fitted, constants)["weight"]
    assert torch.equal(whole.view(torch.uint8), again.view(torch.uint8))
    part = fmt.row_multiple * 2 if fmt.row_multiple > 1 else 8
    head = quantize_compensated(rows[:part], plan, fmt, fitted, constants)["weight"]
    # A matrix product of another shape may round otherwise, and one element that does moves those after it.
    assert (head.view(torch.uint8) == whole[:part].view(torch.uint8)).float().mean() > 0.95


def test_diagonal_blocks_do_for_what_is_correlated_within_them() -> None:
    rows, fmt = weight(), Mxfp4()
    inputs, unseen = correlated_inputs(2048), correlated_inputs(512, seed=2)
    fitted, constants = fitted_to(fmt, rows)
    moments = moments_of(inputs)
    blocks = [moments[:128, :128], moments[128:, 128:]]
    errors = {
        name: output_error(fmt, quantize_compensated(rows, plan, fmt, fitted, constants), rows, unseen)
        for name, plan in (
            ("full", plan_compensation([moments])),
            ("blocks", plan_compensation(blocks)),
        )
    }
    nearest = output_error(fmt, fmt.quantize_rows(rows, fitted), rows, unseen)
    assert errors["full"] < errors["blocks"] < 0.5 * nearest


def test_mul_scale_is_divided_out_once() -> None:
    rows, inputs, unseen = weight(), correlated_inputs(2048), correlated_inputs(512, seed=2)
    mul_scale = torch.exp2(torch.randint(-2, 3, (COLUMNS,), generator=torch.Generator().manual_seed(3)).float())
    fmt = Mxfp4(smooth=True)
    fitted, constants = fitted_to(fmt, rows, mul_scale)
    plan = plan_compensation([moments_of(inputs) * mul_scale[:, None] * mul_scale])
    nearest = fmt.quantize_rows(rows, fitted) | constants
    compensated = quantize_compensated(rows, plan, fmt, fitted, constants) | constants
    assert torch.equal(compensated["weight_scale"], nearest["weight_scale"])
    # The stored tensors stand for W with mul_scale in them: no smoothing of the inputs here.
    assert output_error(fmt, compensated, rows, unseen) < 0.2 * output_error(fmt, nearest, rows, unseen)


def test_the_order_is_that_of_loudness() -> None:
    (plan,) = plan_compensation([torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.0]))])
    assert plan.order.tolist() == [1, 2, 3, 0]  # of the silent channel nothing is known: it counts as average
    assert (plan.start, plan.stop) == (0, 4)


@pytest.mark.parametrize("samples", [1, 3])
def test_few_inputs_give_a_plan_all_the_same(samples: int) -> None:
    inputs = correlated_inputs(samples)
    rows, fmt = weight(8), Int8()
    (plan,) = plan_compensation([moments_of(inputs)])
    fitted, constants = fitted_to(fmt, rows)
    tensors = quantize_compensated(rows, [plan], fmt, fitted, constants)
    assert output_error(fmt, tensors, rows, inputs) < output_error(fmt, fmt.quantize_rows(rows, fitted), rows, inputs)


def test_moments_that_rounding_made_indefinite_are_damped_more() -> None:
    moments = torch.eye(COLUMNS)
    moments[0, 1] = moments[1, 0] = 1.05  # an eigenvalue of -0.05, more than one percent of the mean
    (plan,) = plan_compensation([moments])
    assert isinstance(plan, Compensation)
    assert bool(torch.isfinite(plan.factor).all())


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS"])
def test_gptq_lowers_the_output_error_of_super_blocks(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    seen, unseen = (torch.randn(2000, 256, generator=generator) / torch.arange(1, 257) @ directions for _ in range(2))
    weight = torch.randn(48, 256, generator=generator)
    weight[5] = 0
    fmt = Gguf(kind)
    fitted = fmt.fit([TensorRows(weight)], None)
    plan = plan_compensation([seen.T @ seen])
    stored = quantize_compensated(weight, plan, fmt, fitted, {})
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        name: (layout.dtype, layout.shape) for name, layout in fmt.layout(48, 256).items()
    }
    errors = [
        float((unseen @ (fmt.dequantize(each) - weight).T).square().sum()) for each in (stored, fmt.quantize(weight))
    ]
    assert errors[0] < 0.8 * errors[1]
    assert bool((fmt.dequantize(stored)[5] == 0).all())
