"""Choosing how to round: `auto` is never worse than nearest rounding on held-out rows, in any format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omni_convert.convert.calibration.moments import InputMoments, MomentsRecorder
from omni_convert.convert.calibration.rounding import CompensatedFormat
from omni_convert.formats.arithmetic.smoothing import split_input_rows
from omni_convert.formats.format import ElementFormat, Format
from omni_convert.formats.rows import InputColumns, TensorRows
from omni_convert.formats.schemes.awq import AwqInt4
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.schemes.gguf import Gguf
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.schemes.svdquant import SvdQuantInt4, SvdQuantNvfp4
from omni_convert.formats.statistics.layer_statistics import LayerStatistics, observe
from omni_convert.loaders.kernels.kernel import rounded_input

COLUMNS = 128
FORMATS = [
    Fp8(),
    Fp8(static=True),
    Fp8Channel(),
    Fp8Block((32, 32)),
    Int8(),
    Mxfp8(),
    Mxfp4(),
    Mxfp4(smooth=True),
    Mxfp4DualScale(smooth=True),
    Nvfp4(),
    Nvfp4(static=True),
    Gguf("Q5_0"),
    Gguf("Q4_1"),
    Gguf("IQ4_NL"),
    Int4(group=32),
    Nf4(nested=True).for_weight((64, COLUMNS)),
    AwqInt4(),
    SvdQuantInt4(rank=16),
    SvdQuantNvfp4(rank=16),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.label}-{FORMATS.index(fmt)}")


def inputs(samples: int, correlation: float, seed: int = 1) -> Tensor:
    """Inputs with energy in few directions where `correlation` is large, and with louder and quieter channels."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator)).Q
    loudness = torch.exp(torch.randn(COLUMNS, generator=generator) * correlation)
    latent = torch.randn(samples, COLUMNS, generator=torch.Generator().manual_seed(seed))
    energy = torch.arange(1, COLUMNS + 1).float().pow(-correlation)
    return ((latent * energy) @ directions.T * loudness).bfloat16()


def recorded(rows: Tensor) -> tuple[LayerStatistics, InputMoments]:
    recorder = MomentsRecorder()
    for prompt, some in enumerate(rows.chunk(8)):
        recorder.record(observe(some), 0, prompt)
    statistics, moments = recorder.statistics(), recorder.moments()
    assert statistics is not None
    assert moments is not None
    return statistics, moments


def members() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, COLUMNS, generator=generator).bfloat16() for rows in (64, 40)]


def error_on(fmt: Format, statistics: LayerStatistics, rows: Tensor) -> float:
    """Squared error of the outputs of the group as the runtime computes them."""
    weights = members()
    fitted = fmt.fit([TensorRows(weight) for weight in weights], statistics)
    constants = fmt.constants(fitted)
    base = fmt.base if isinstance(fmt, CompensatedFormat) else fmt
    seen = rounded_input(rows, constants, base)
    total = 0.0
    for weight in weights:
        tensors = fmt.quantize_rows(weight, fitted) | constants
        assert {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()} == {
            suffix: layout.shape for suffix, layout in fmt.layout(*weight.shape).items()
        }
        difference = seen @ base.multiplied(tensors).T - rows.float() @ weight.float().T
        side = base.side_product(rows.float(), tensors)
        difference += torch.zeros(1) if side is None else side
        total += float(difference.square().sum(dtype=torch.float64))
    return total


@every_format
@pytest.mark.parametrize(("samples", "correlation"), [(2, 0.0), (70, 0.0), (40, 1.0), (2000, 1.0)])
def test_auto_is_never_worse_than_nearest_on_held_out_rows(fmt: Format, samples: int, correlation: float) -> None:
    statistics, moments = recorded(inputs(samples, correlation))
    _, held_out = split_input_rows(moments.sample)
    auto = error_on(CompensatedFormat(fmt, lambda: moments, "auto"), statistics, held_out)
    assert auto <= error_on(fmt, statistics, held_out)


@every_format
@pytest.mark.parametrize(("has_moments", "part_left"), [(True, 0.9), (False, 0.95)])
def test_gptq_lowers_the_error_on_inputs_that_were_never_seen(
    fmt: ElementFormat, has_moments: bool, part_left: float
) -> None:
    statistics, moments = recorded(inputs(2000, 1.0))
    read = (lambda: moments) if has_moments else None
    unseen = inputs(300, 1.0, seed=2)
    nearest = error_on(fmt, statistics, unseen)
    for rounding in ("gptq", "auto"):
        assert error_on(CompensatedFormat(fmt, read, rounding), statistics, unseen) < part_left * nearest


def test_statistics_of_earlier_versions_and_of_some_columns_do_too() -> None:
    statistics, _ = recorded(inputs(2000, 1.0))
    old = replace(statistics, squares=None, sample_runs=None)
    unseen = inputs(300, 1.0, seed=2)
    for fmt in (Int4(group=32), Mxfp4(smooth=True)):
        assert error_on(CompensatedFormat(fmt, None, "auto"), old, unseen) < 0.95 * error_on(fmt, old, unseen)
    some, weight = InputColumns(statistics, 32, 96), TensorRows(members()[0][:, 32:96])
    rows, fmt = unseen[:, 32:96].float(), Int4(group=32)
    errors = []
    for each in (fmt, CompensatedFormat(fmt, None, "auto")):
        tensors = each.quantize_rows(weight.weight, each.fit([weight], some))
        errors.append(float((rows @ (fmt.dequantize(tensors) - weight.weight.float()).T).square().sum()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("samples", [1, 2, 70])
def test_statistics_of_unrelated_channels_leave_nearest_rounding(samples: int) -> None:
    statistics, _ = recorded(inputs(samples, 0.0))
    fmt, rows = Int8(), inputs(300, 0.0, seed=2)
    assert error_on(CompensatedFormat(fmt, None, "auto"), statistics, rows) == error_on(fmt, statistics, rows)


def test_auto_keeps_nearest_rounding_where_the_moments_mislead() -> None:
    rows = inputs(2000, 1.0)
    statistics, moments = recorded(rows)
    _, others = recorded(rows.flip(1))
    misleading = InputMoments(others.products, others.count, moments.sample)
    fmt = Int8()
    nearest = error_on(fmt, statistics, rows)
    assert error_on(CompensatedFormat(fmt, lambda: misleading, "gptq"), statistics, rows) > nearest
    assert error_on(CompensatedFormat(fmt, lambda: misleading, "auto"), statistics, rows) == nearest


def test_one_recorded_row_leaves_nothing_to_compare() -> None:
    statistics, moments = recorded(inputs(1, 1.0))
    fmt, rows = Int8(), inputs(8, 1.0)
    assert error_on(CompensatedFormat(fmt, lambda: moments, "auto"), statistics, rows) == error_on(
        fmt, statistics, rows
    )


def test_tiles_keep_to_what_the_format_needs() -> None:
    _, moments = recorded(inputs(4, 1.0))
    for multiple in (1, 48, 128):
        fmt = CompensatedFormat(Fp8Block((multiple, 32)), lambda: moments, "gptq")
        assert fmt.row_multiple % multiple == 0
        assert fmt.row_multiple >= 1024


def test_the_number_of_threads_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(600, 1024, generator=generator).bfloat16()
    statistics, moments = recorded(torch.randn(2000, 1024, generator=generator).cumsum(1).bfloat16())
    fmt, before = CompensatedFormat(Int8(), lambda: moments, "gptq"), torch.get_num_threads()
    factors = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        factors.append(fmt.fit([TensorRows(rows)], statistics).compensations[0].factor)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(*factors)
