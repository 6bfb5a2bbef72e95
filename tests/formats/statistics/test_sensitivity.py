"""Sensitivity: what is predicted is what errors do, parts merge exactly, and damaged files are refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.exact_sums import exact_sums
from omni_convert.formats.statistics.sensitivity import LayerSensitivity, PipelineSensitivity, SensitivityRecorder

OUT, IN, TOKENS = 24, 40, 300
CPU = torch.device("cpu")


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, and gradients at the output and the input; some tokens and channels matter more than others."""
    importance = noise(TOKENS, 1, seed=seed).exp()
    inputs = noise(TOKENS, IN, seed=seed + 1).to(torch.bfloat16) * noise(IN, seed=3).exp().to(torch.bfloat16)
    outputs = noise(TOKENS, OUT, seed=seed + 2) * importance * noise(OUT, seed=4).exp()
    return inputs, outputs, noise(TOKENS, IN, seed=seed + 3) * importance


def recorded(*seeds: int) -> LayerSensitivity:
    recorder = SensitivityRecorder("transformer.layer", OUT, IN, CPU)
    for seed in seeds:
        inputs, at_output, at_input = tokens(seed)
        for part in range(3):  # as if there were three steps
            recorder.record_output(at_output[part::3], inputs[part::3])
            recorder.record_input(at_input[part::3], inputs[part::3])
        recorder.finish_prompt(100)
    found = recorder.sensitivity()
    assert found is not None
    return found


def same(first: LayerSensitivity, second: LayerSensitivity) -> bool:
    return all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())


def test_weight_errors_of_all_tokens_add_up_before_they_are_squared() -> None:
    seeds = range(0, 400, 10)
    found = recorded(*seeds)
    squared = noise(OUT, IN, seed=9).square()
    exact = 0.0
    for seed in seeds:
        inputs, at_output, _ = tokens(seed)
        exact += float((squared * (at_output.T @ inputs.float()).square()).sum()) / 100
    by_tile = [found.weight_error(squared[start : start + 10], slice(start, start + 10)) for start in range(0, OUT, 10)]
    assert sum(by_tile) == pytest.approx(exact, rel=0.05)


def test_input_errors_are_weighed_by_the_tokens_that_matter() -> None:
    seeds = range(0, 400, 10)
    found = recorded(*seeds)

    def error_of(inputs: torch.Tensor) -> torch.Tensor:
        return inputs.float().square() * inputs.float().abs().amax(1, keepdim=True)

    exact = sum(float((tokens(seed)[2].square() * error_of(tokens(seed)[0])).sum()) / 100 for seed in seeds)
    assert found.input_error(error_of(found.rows), 8) == pytest.approx(exact, rel=0.35)  # 64 rows of 12,000


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_errors_add_up_before_they_are_squared(bits: int) -> None:
    """A text goes into its layers again in each step: it is rounded alike there."""
    once, again = (SensitivityRecorder("transformer.layer", OUT, IN, CPU) for _ in range(2))
    for seed in range(0, 200, 10):
        inputs, _, gradient = tokens(seed)
        for _ in range(5):
            again.record_input(gradient, inputs)
        once.record_input(gradient * 5**0.5, inputs)
        for recorder in (once, again):
            recorder.finish_prompt(100)
    errors = []
    for recorder in (once, again):
        found = recorder.sensitivity()
        assert found is not None
        errors.append(found.input_error(found.rows.float().square(), bits))
    # Five equal errors are 25 times one when squared, and five times one if they are taken for different ones.
    assert errors[1] / errors[0] == pytest.approx(5, rel=0.1)


def test_gradients_are_left_as_they_are() -> None:
    """They go on to the layers before, in float32 without a copy."""
    inputs, at_output, at_input = tokens(10)
    recorder = SensitivityRecorder("transformer.layer", OUT, IN, CPU)
    recorder.record_output(at_output, inputs)
    recorder.record_input(at_input, inputs)
    assert torch.equal(at_output, tokens(10)[1])
    assert torch.equal(at_input, tokens(10)[2])


def test_parts_merge_exactly_in_any_order() -> None:
    whole = recorded(10, 20, 30)
    for parts in itertools.permutations([recorded(10), recorded(20), recorded(30)]):
        assert same(LayerSensitivity.merged([LayerSensitivity.merged(parts[:2]), parts[2]]), whole)


def pipeline(seed: int) -> PipelineSensitivity:
    return PipelineSensitivity({"transformer.layer": recorded(seed)}, exact_sums(torch.tensor([0.25])), 1)


def test_a_file_holds_everything() -> None:
    before = pipeline(10).merge([pipeline(20)])
    after = PipelineSensitivity.from_tensors("file", before.tensors())
    assert after is not None
    assert same(after.layers["transformer.layer"], before.layers["transformer.layer"])
    assert (after.prompts, after.rounding_error) == (2, 0.25)
    assert PipelineSensitivity.from_tensors("file", {}) is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("sensitivity.prompts", torch.tensor([0])),
        ("sensitivity.rounding", torch.tensor([[1.0], [0.0]])),
        ("sensitivity.transformer.layer.rows", torch.zeros(0, IN, dtype=torch.bfloat16)),
        ("sensitivity.transformer.layer.rows", torch.full((1, IN), torch.nan, dtype=torch.bfloat16)),
        ("sensitivity.transformer.layer.weights", -torch.ones(64)),
        ("sensitivity.transformer.layer.input_sums", torch.zeros(2, IN - 1, dtype=torch.int64)),
        ("sensitivity.transformer.layer.repeated_sums", torch.zeros(2, 3, dtype=torch.int64)),
    ],
)
def test_damaged_values_are_refused(name: str, tensor: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match=name.rpartition(".")[2]):
        PipelineSensitivity.from_tensors("file", {**pipeline(10).tensors(), name: tensor})


def test_gradients_that_are_not_finite_are_refused() -> None:
    recorder = SensitivityRecorder("layer", OUT, IN, CPU)
    recorder.record_output(torch.full((1, OUT), torch.inf), torch.ones(1, IN))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        recorder.finish_prompt(1)
