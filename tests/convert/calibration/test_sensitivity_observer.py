"""The sensitivity of a real (tiny) pipeline, against what errors in its layers do to its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline

from omni_convert.convert.calibration.generation import GenerationSettings, differentiable_images
from omni_convert.convert.calibration.pipeline_recorder import PipelineRecorder
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.calibration.sensitivity_observer import SensitivityObserver
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.sensitivity import PipelineSensitivity

SETTINGS = GenerationSettings(steps=2, width=32, height=32, guidance_scale=2.0)
PROMPT = Prompt("a red circle")
LAYER = "layers.1.feed_forward.w2"


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder: Path) -> Any:
    pipe = ZImagePipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sensitivity(pipe: Any) -> PipelineSensitivity:
    observer = SensitivityObserver(pipe, {"transformer": pipe.transformer})
    with observer:
        for direction in range(12):
            observer.record(PROMPT, SETTINGS, 0, direction)
    return observer.sensitivity()


def images(pipe: Any) -> torch.Tensor:
    return differentiable_images(pipe, PROMPT, SETTINGS, 0).detach()


def test_it_predicts_what_an_error_of_a_weight_does(pipe: Any, sensitivity: PipelineSensitivity) -> None:
    weight = pipe.transformer.get_parameter(f"{LAYER}.weight")
    kept = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    measured, predicted = [], []
    before = images(pipe)
    for _ in range(4):
        error = torch.randn(weight.shape, generator=generator) * kept.std() * 1e-2
        with torch.no_grad():
            weight.copy_(kept + error)
        measured.append(float((images(pipe) - before).square().mean()))
        with torch.no_grad():
            weight.copy_(kept)
        layer = sensitivity.layers[f"transformer.{LAYER}"]
        predicted.append(layer.weight_error(error.square(), slice(None)) / sensitivity.prompts)
    assert sum(predicted) == pytest.approx(sum(measured), rel=0.5)


def test_the_pipeline_is_left_as_it_was(pipe: Any, sensitivity: PipelineSensitivity) -> None:
    assert sensitivity.prompts == 12
    assert "forward" not in vars(pipe.transformer)
    assert not pipe.transformer.is_gradient_checkpointing
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.transformer.parameters())
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


def test_prompts_may_be_distributed(tiny_pipeline_folder: Path) -> None:
    prompts = [PROMPT, Prompt("a star")]
    pipe = ZImagePipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    recorder = PipelineRecorder(pipe, SETTINGS)
    whole = recorder.record(prompts, prompts).statistics
    first, second = (recorder.record([prompt], [prompt]).statistics for prompt in prompts)
    assert second.merge([first]).fingerprint() == whole.fingerprint()
    assert whole.sensitivity is not None
    assert whole.sensitivity.rounding_error > 0
    without = recorder.record([PROMPT]).statistics
    assert without.sensitivity is None
    assert without.merge([second]).sensitivity is not None


def test_a_pipeline_that_cannot_be_differentiated_says_so(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda latents, **options: decode(latents.detach(), **options))
    observer = SensitivityObserver(pipe, {"transformer": pipe.transformer})
    with observer, pytest.raises(CalibrationError, match="without gradients"):
        observer.record(PROMPT, SETTINGS, 0, 0)
