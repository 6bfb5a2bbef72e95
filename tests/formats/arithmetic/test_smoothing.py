from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.input_values import quantize_mxfp4_dualscale_input, quantize_mxfp4_input
from omni_convert.formats.arithmetic.smoothing import channel_amax, split_input_rows
from omni_convert.formats.format import Format
from omni_convert.formats.rows import InputStatistics, TensorRows
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale

CASES = [
    (Mxfp4(smooth=True), quantize_mxfp4_input),
    (Mxfp4DualScale(), quantize_mxfp4_dualscale_input),
]
formats_with_mul_scale = pytest.mark.parametrize(("fmt", "quantize_input"), CASES, ids=["mxfp4", "dualscale"])


def held_out_error(
    fmt: Format, quantize_input, members: list[Tensor], inputs: InputStatistics, mul_scale: Tensor
) -> float:  # type: ignore[no-untyped-def]
    """Squared output error as the runtime would make it, from the tensors on disk."""
    _, rows = split_input_rows(inputs.rows())
    seen = quantize_input(rows * mul_scale.to(rows.dtype))
    total = 0.0
    for member in members:
        tensors = fmt.quantize_rows(member, mul_scale)
        stored = fmt.dequantize(tensors | {"mul_scale": torch.ones_like(mul_scale)})
        total += float((seen @ stored.T - rows.float() @ member.float().T).double().square().sum())
    return total


def case(outliers: float, seed: int, samples: int = 96, columns: int = 256) -> tuple[list[Tensor], Tensor]:
    """Weights of a group, and rows of its input."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(columns, generator=generator) * outliers)
    members = [torch.randn(40, columns, generator=generator).bfloat16() for _ in range(2)]
    recorded = (torch.randn(samples, columns, generator=generator) * spread).bfloat16()
    return members, recorded


@formats_with_mul_scale
@pytest.mark.parametrize("outliers", [0.0, 0.5, 2.0])
def test_never_worse_than_one_on_held_out_rows(fmt: Format, quantize_input, record_inputs, outliers: float) -> None:  # type: ignore[no-untyped-def]
    for seed in range(3):
        members, rows = case(outliers, seed)
        inputs = record_inputs(rows)
        mul_scale = fmt.constants(fmt.fit([TensorRows(member) for member in members], inputs))["mul_scale"]
        ones = torch.ones_like(mul_scale)
        found = held_out_error(fmt, quantize_input, members, inputs, mul_scale)
        assert found <= held_out_error(fmt, quantize_input, members, inputs, ones)


@formats_with_mul_scale
def test_outlier_channels_are_worth_a_lot(fmt: Format, quantize_input, record_inputs) -> None:  # type: ignore[no-untyped-def]
    members, rows = case(outliers=2.0, seed=0)
    inputs = record_inputs(rows)
    mul_scale = fmt.constants(fmt.fit([TensorRows(member) for member in members], inputs))["mul_scale"]
    ones = torch.ones_like(mul_scale)
    found = held_out_error(fmt, quantize_input, members, inputs, mul_scale)
    assert found < 0.9 * held_out_error(fmt, quantize_input, members, inputs, ones)


@formats_with_mul_scale
def test_too_few_rows_to_hold_any_out_gives_ones(fmt: Format, quantize_input, record_inputs) -> None:  # type: ignore[no-untyped-def]
    members, rows = case(outliers=2.0, seed=0, samples=1)
    inputs = record_inputs(rows)
    mul_scale = fmt.constants(fmt.fit([TensorRows(member) for member in members], inputs))["mul_scale"]
    assert torch.equal(mul_scale, torch.ones_like(mul_scale))


@formats_with_mul_scale
def test_silent_channels_give_a_usable_scale(fmt: Format, quantize_input, record_inputs) -> None:  # type: ignore[no-untyped-def]
    members, rows = case(outliers=2.0, seed=0)
    rows[:, :32] = 0
    members[0][:, 64:96] = 0
    members[1][:, 64:96] = 0
    mul_scale = fmt.constants(fmt.fit([TensorRows(member) for member in members], record_inputs(rows)))["mul_scale"]
    assert bool((torch.isfinite(mul_scale) & (mul_scale > 0)).all())
    assert torch.equal(mul_scale, mul_scale.bfloat16().float())


def test_channel_amax_spans_the_group() -> None:
    first, second = torch.tensor([[1.0, -2.0], [0.5, 1.0]]), torch.tensor([[-3.0, 0.25]])
    assert channel_amax([TensorRows(first), TensorRows(second)]).tolist() == [3.0, 2.0]
