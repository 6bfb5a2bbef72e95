from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.input_values import quantize_mxfp4_dualscale_input, quantize_mxfp4_input
from omni_convert.formats.arithmetic.smoothing import channel_amax
from omni_convert.formats.format import Format
from omni_convert.formats.rows import InputStatistics, TensorRows
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale

CASES = [
    (Mxfp4(smooth=True), quantize_mxfp4_input),
    (Mxfp4DualScale(), quantize_mxfp4_dualscale_input),
]
formats_with_mul_scale = pytest.mark.parametrize(("fmt", "quantize_input"), CASES, ids=["mxfp4", "dualscale"])


def output_error(fmt: Format, quantize_input, members: list[Tensor], rows: Tensor, mul_scale: Tensor) -> float:  # type: ignore[no-untyped-def]
    """Squared output error as the runtime would make it, from the tensors on disk."""
    seen = quantize_input(rows * mul_scale.to(rows.dtype))
    total = 0.0
    for member in members:
        tensors = fmt.quantize_rows(member, mul_scale)
        stored = fmt.dequantize(tensors | {"mul_scale": torch.ones_like(mul_scale)})
        total += float((seen @ stored.T - rows.float() @ member.float().T).double().square().sum())
    return total


def found_scale(fmt: Format, members: list[Tensor], inputs: InputStatistics) -> Tensor:
    return fmt.constants(fmt.fit([TensorRows(member) for member in members], inputs))["mul_scale"]


def case(outliers: float, seed: int, samples: int = 96, columns: int = 256) -> tuple[list[Tensor], Tensor]:
    """Weights of a group, and rows of its input."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(columns, generator=generator) * outliers)
    members = [torch.randn(40, columns, generator=generator).bfloat16() for _ in range(2)]
    recorded = (torch.randn(samples, columns, generator=generator) * spread).bfloat16()
    return members, recorded


@formats_with_mul_scale
@pytest.mark.parametrize("outliers", [0.0, 0.5, 2.0])
def test_hardly_ever_worse_than_one_on_rows_of_other_prompts(
    fmt: Format, quantize_input, record_inputs, outliers: float
) -> None:  # type: ignore[no-untyped-def]
    for seed in range(3):
        members, rows = case(outliers, seed, samples=192)
        inputs = record_inputs(rows[:96])
        mul_scale = found_scale(fmt, members, inputs)
        found = output_error(fmt, quantize_input, members, rows[96:], mul_scale)
        assert found <= 1.01 * output_error(fmt, quantize_input, members, rows[96:], torch.ones_like(mul_scale))


@formats_with_mul_scale
def test_outlier_channels_are_worth_a_lot(fmt: Format, quantize_input, record_inputs) -> None:  # type: ignore[no-untyped-def]
    members, rows = case(outliers=2.0, seed=2, samples=192)
    mul_scale = found_scale(fmt, members, record_inputs(rows[:96]))
    found = output_error(fmt, quantize_input, members, rows[96:], mul_scale)
    assert found < 0.9 * output_error(fmt, quantize_input, members, rows[96:], torch.ones_like(mul_scale))


@formats_with_mul_scale
@pytest.mark.parametrize("samples", [1, 96])
def test_one_step_of_one_prompt_proves_nothing(fmt: Format, quantize_input, record_inputs, samples: int) -> None:  # type: ignore[no-untyped-def]
    members, rows = case(outliers=2.0, seed=0, samples=samples)
    mul_scale = found_scale(fmt, members, record_inputs(rows, prompts=1))
    assert torch.equal(mul_scale, torch.ones_like(mul_scale))


@formats_with_mul_scale
def test_silent_channels_give_a_usable_scale(fmt: Format, quantize_input, record_inputs) -> None:  # type: ignore[no-untyped-def]
    members, rows = case(outliers=2.0, seed=0)
    rows[:, :32] = 0
    members[0][:, 64:96] = 0
    members[1][:, 64:96] = 0
    mul_scale = found_scale(fmt, members, record_inputs(rows))
    assert bool((torch.isfinite(mul_scale) & (mul_scale > 0)).all())
    assert torch.equal(mul_scale, mul_scale.bfloat16().float())


def test_channel_amax_spans_the_group() -> None:
    first, second = torch.tensor([[1.0, -2.0], [0.5, 1.0]]), torch.tensor([[-3.0, 0.25]])
    assert channel_amax([TensorRows(first), TensorRows(second)]).tolist() == [3.0, 2.0]
