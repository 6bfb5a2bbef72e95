"""Recording: what is kept is exact, and does not depend on how the values arrive."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from omni_convert.formats.errors import RecipeError
from omni_convert.formats.rows import InputStatistics
from omni_convert.formats.statistics import layer_statistics
from omni_convert.formats.statistics.layer_statistics import SAMPLE_ROWS, InputRecorder, LayerStatistics, observe

#: Step and input of each; the step stands for the prompt, too.
Batches = list[tuple[int, torch.Tensor]]


def record(batches: Batches) -> LayerStatistics:
    recorder = InputRecorder()
    for step, values in batches:
        recorder.record(observe(values), step, prompt=step % 2)
    statistics = recorder.statistics()
    assert statistics is not None
    return statistics


def same(first: LayerStatistics, second: LayerStatistics) -> bool:
    return all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())


@st.composite
def batch_lists(draw: st.DrawFn) -> list[Batches]:
    """Two to four lists of batches of one width: [rows, width] with values over many magnitudes, many rows equal."""
    width = draw(st.sampled_from([1, 4, 6]))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)

    def batch() -> torch.Tensor:
        rows = draw(st.integers(1, 70))
        exponents = torch.randint(-60, 40, (rows, 1), generator=generator)
        values = torch.randint(-2, 3, (rows, width), generator=generator) * torch.exp2(exponents.float())
        return values.to(draw(st.sampled_from([torch.bfloat16, torch.float32])))

    def batches() -> Batches:
        return [(draw(st.integers(0, 3)), batch()) for _ in range(draw(st.integers(1, 3)))]

    return [batches() for _ in range(draw(st.integers(2, 4)))]


@settings(deadline=None, max_examples=60)
@given(parts=batch_lists())
def test_merging_gives_what_recording_everything_at_once_gives(parts: list[Batches]) -> None:
    together = record([batch for part in parts for batch in part])
    assert same(LayerStatistics.merged([record(part) for part in parts]), together)


@settings(deadline=None, max_examples=60)
@given(parts=batch_lists(), order=st.randoms(use_true_random=False))
def test_merging_knows_neither_order_nor_grouping(parts: list[Batches], order: object) -> None:
    recorded = [record(part) for part in parts]
    shuffled = list(recorded)
    order.shuffle(shuffled)  # type: ignore[attr-defined]  # a random.Random
    one_by_one = shuffled[0]
    for part in shuffled[1:]:
        one_by_one = LayerStatistics.merged([part, one_by_one])
    assert same(LayerStatistics.merged(recorded), one_by_one)


@settings(deadline=None, max_examples=30)
@given(parts=batch_lists())
def test_how_rows_are_batched_does_not_matter(parts: list[Batches]) -> None:
    batches = [(0, values.float()) for part in parts for _, values in part]
    assert same(record(batches), record([(0, torch.cat([values for _, values in batches]))]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [5, 32])
def test_what_is_recorded_is_exact(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int) -> None:
    monkeypatch.setitem(layer_statistics.TILE_ELEMENTS, "cpu", 7 * width)  # several tiles, the last one short
    values = torch.randn(100, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistics = record([(2, values)])
    magnitudes = values.float().abs()
    assert statistics.amax() == float(magnitudes.max())
    assert torch.equal(statistics.channel_amax(), magnitudes.amax(0))
    assert statistics.step_amax.tolist() == [0.0, 0.0, float(magnitudes.max())]
    assert statistics.values_seen == values.numel()
    assert statistics.rows_seen == 100
    expected = values.double().square().mean(0)
    torch.testing.assert_close(statistics.mean_square().double(), expected, rtol=1e-6, atol=1e-9)
    assert statistics.rows().shape == (SAMPLE_ROWS, width)
    seen = {tuple(row) for row in values.to(torch.bfloat16).tolist()}
    assert {tuple(row) for row in statistics.rows().tolist()} <= seen


def test_the_sample_is_spread_over_everything_that_was_seen() -> None:
    # Rows carry the number of their batch: of 20 batches none should fill the sample.
    batches = [(0, torch.cat([torch.full((50, 1), float(i)), torch.randn(50, 7)], dim=1)) for i in range(20)]
    counts = torch.bincount(record(batches).rows()[:, 0].long(), minlength=20)
    assert int((counts > 0).sum()) >= 15
    assert int(counts.max()) <= 12


def test_equal_rows_are_sampled_once() -> None:
    values = torch.arange(3.0)[:, None].repeat(40, 4)
    assert sorted(record([(0, values), (1, values)]).rows()[:, 0].tolist()) == [0.0, 1.0, 2.0]


def test_each_row_knows_its_run_and_equal_rows_have_the_smallest() -> None:
    values = torch.arange(3.0)[:, None].repeat(1, 4)
    statistics = record([(3, values), (1, values[1:]), (2, values[2:])])
    runs = {int(row[0]): tuple(run.tolist()) for row, run in zip(statistics.rows(), statistics.row_runs(), strict=True)}
    assert runs == {0: (1, 3), 1: (1, 1), 2: (0, 2)}


def test_steps_are_told_apart_and_short_runs_merge_with_long_ones() -> None:
    short = record([(0, torch.ones(1, 4)), (1, torch.full((1, 4), 3.0))])
    long = record([(0, torch.full((1, 4), 2.0)), (2, torch.full((1, 4), -5.0))])
    assert LayerStatistics.merged([short, long]).step_amax.tolist() == [2.0, 3.0, 5.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_show_in_the_amax(value: float, dtype: torch.dtype) -> None:
    values = torch.ones(9, 8, dtype=dtype)
    values[4, 3] = value
    assert not math.isfinite(observe(values).amax)


def test_the_clip_rules() -> None:
    inputs: InputStatistics = record([(0, torch.cat([torch.randn(4000, 8), torch.full((1, 8), 50.0)]))])
    assert inputs.clip("max", 448) == inputs.amax() == 50.0
    assert 2 < inputs.clip("percentile:99.9", 448) < 6
    assert inputs.clip("percentile:100", 448) == 50.0
    tailed = record([(0, torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)).pow(3))])
    assert tailed.amax() / 64 < tailed.clip("mse", 127) < tailed.amax()


@pytest.mark.parametrize("rule", ["median", "percentile", "percentile:0", "percentile:101", "percentile:x", "max:3"])
def test_an_unknown_clip_rule(rule: str) -> None:
    with pytest.raises(RecipeError, match="expected max, mse or percentile:P"):
        record([(0, torch.ones(1, 4))]).clip(rule, 448)


def test_the_input_is_not_kept() -> None:
    recorder = InputRecorder()
    recorder.record(observe(torch.randn(5000, 64).to(torch.bfloat16)), 0)
    statistics = recorder.statistics()
    assert statistics is not None
    assert statistics.rows().untyped_storage().nbytes() == SAMPLE_ROWS * 64 * 2


def test_nothing_recorded_is_no_statistics() -> None:
    assert InputRecorder().statistics() is None
