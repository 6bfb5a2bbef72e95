"""GPTQ from rows and mean squares: that of the same moments, without a matrix [in, in]."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_convert.convert.calibration.gptq import Compensation, plan_compensation, quantize_compensated
from omni_convert.convert.calibration.low_rank_gptq import DAMPING, SHARE, STRIPS, plan_low_rank_compensation
from omni_convert.formats.schemes.mxfp4 import Mxfp4

CPU = torch.device("cpu")
FORMAT = Mxfp4()


def inputs(columns: int) -> tuple[Tensor, Tensor]:
    """A sample of 40 rows whose channels are related and differ in size, and mean squares of more such rows."""
    generator = torch.Generator().manual_seed(columns)
    latent = torch.randn(2000, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    loudness = torch.exp(0.5 * torch.randn(columns, generator=generator))
    rows = (latent + torch.randn(2000, columns, generator=generator)) * loudness
    return rows[:40], rows.square().mean(0)


def estimated_moments(sample: Tensor, mean_square: Tensor) -> Tensor:
    """The estimate of the second moments, float64 [in, in], by its definition."""
    products = SHARE * sample.double().T @ sample.double() / len(sample)
    diagonal = torch.maximum(mean_square.double() - products.diagonal(), (1 - SHARE) * mean_square.double())
    return products + torch.diag(diagonal + DAMPING * mean_square.double().mean())


def weight(columns: int) -> Tensor:
    return torch.randn(96, columns, generator=torch.Generator().manual_seed(1))


def error(rows: Tensor, compensations: list[Compensation], moments: Tensor) -> float:
    """Squared output error of rows that are rounded so, for inputs with these moments."""
    tensors = (
        quantize_compensated(rows, compensations, FORMAT, None, {})
        if compensations
        else FORMAT.quantize_rows(rows, None)
    )
    difference = (FORMAT.dequantize(tensors) - rows).double()
    return float((difference @ moments * difference).sum())


def test_single_columns_give_what_the_whole_matrix_gives() -> None:
    sample, mean_square = inputs(STRIPS)
    moments = estimated_moments(sample, mean_square)
    [whole] = plan_compensation([moments.float()])
    low_rank = plan_low_rank_compensation(sample, mean_square, CPU)
    assert torch.equal(low_rank.order, mean_square.argsort(descending=True, stable=True))
    rows = weight(STRIPS)
    expected, found = error(rows, [whole], moments), error(rows, [low_rank], moments)
    assert abs(found / expected - 1) < 0.01
    assert found < 0.7 * error(rows, [], moments)


def test_strips_of_columns_leave_little_more_error() -> None:
    sample, mean_square = inputs(8 * STRIPS)
    moments = estimated_moments(sample, mean_square)
    [whole] = plan_compensation([moments.float()])
    rows = weight(8 * STRIPS)
    low_rank = error(rows, [plan_low_rank_compensation(sample, mean_square, CPU)], moments)
    assert low_rank < 1.02 * error(rows, [whole], moments)


@pytest.mark.parametrize(("loudness", "most"), [(1e3, 0.7), (1e15, 3.0)])
def test_one_loud_row_in_the_sample_does_not_overwhelm_the_weights(loudness: float, most: float) -> None:
    sample, mean_square = inputs(8 * STRIPS)
    moments, rows = estimated_moments(sample, mean_square), weight(8 * STRIPS)
    sample[3] *= loudness
    plan = plan_low_rank_compensation(sample, mean_square, CPU)
    assert error(rows, [plan], moments) < most * error(rows, [], moments)


@pytest.mark.parametrize("part", [1, 40])
def test_rows_are_rounded_alone_as_within_the_weight(part: int) -> None:
    rows = weight(8 * STRIPS)
    plan = plan_low_rank_compensation(*inputs(8 * STRIPS), CPU)
    whole, head = (
        quantize_compensated(some, [plan], FORMAT, None, {})["weight"].view(torch.uint8) for some in (rows, rows[:part])
    )
    assert torch.equal(head, whole[:part])


@pytest.mark.parametrize(("samples", "mean_square"), [(8, 0.0), (8, 1.0), (0, 1.0)])
def test_silent_inputs_leave_nearest_rounding(samples: int, mean_square: float) -> None:
    rows = weight(128)
    silent = plan_low_rank_compensation(torch.zeros(samples, 128), torch.full((128,), mean_square), CPU)
    nearest = FORMAT.quantize_rows(rows, None)
    assert all(
        torch.equal(tensor.view(torch.uint8), nearest[suffix].view(torch.uint8))
        for suffix, tensor in quantize_compensated(rows, [silent], FORMAT, None, {}).items()
    )


def test_a_channel_that_is_silent_makes_up_for_no_other() -> None:
    sample, mean_square = inputs(128)
    sample[:, 5], mean_square[5] = 0.0, 0.0
    rows = weight(128)
    plan = plan_low_rank_compensation(sample, mean_square, CPU)
    rounded = FORMAT.dequantize(quantize_compensated(rows, [plan], FORMAT, None, {}))
    nearest = FORMAT.dequantize(FORMAT.quantize_rows(rows, None))
    assert torch.equal(rounded[:, 5], nearest[:, 5])
    assert not torch.equal(rounded, nearest)
