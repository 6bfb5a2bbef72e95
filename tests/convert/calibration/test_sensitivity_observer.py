"""The sensitivity of a real (tiny) pipeline, against what errors in its layers do to its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch.multiprocessing.reductions import StorageWeakRef

from omni_convert.convert.calibration.generation import GenerationSettings, differentiable_images
from omni_convert.convert.calibration.pipeline_recorder import PipelineRecorder
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.calibration.sensitivity_observer import SensitivityObserver
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.sensitivity import PipelineSensitivity
from omni_convert.loaders import load_pipeline
from omni_convert.loaders.memory.streaming import StoredTensor

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_streamed_pipeline_gives_the_same_sensitivity(
    tiny_pipeline_folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, what a block computes with is a copy of its weights in the file, of which gradients keep none."""
    copies, present = [], [0]

    def counted(stored: StoredTensor, device: torch.device) -> torch.Tensor:
        copy = copied(stored, device)
        copies.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        present.append(sum(size for storage, size in copies if not storage.expired()))
        return copy

    copied = StoredTensor.copy
    monkeypatch.setattr(StoredTensor, "copy", counted)
    found = []
    for memory in ("full", "stream"):
        pipe = load_pipeline(tiny_pipeline_folder, torch_dtype=dtype, memory=memory)
        found.append(PipelineRecorder(pipe, SETTINGS).record([PROMPT], [PROMPT]).statistics)
    assert found[0].fingerprint() == found[1].fingerprint()
    streamer = pipe.streamer
    parts = [part for part in streamer.parts if part.component == "transformer"]
    assert len(parts) == 1 + 4
    largest = parts[0].memory_bytes + 2 * max(part.memory_bytes for part in parts[1:])
    assert max(present) <= (largest if dtype == torch.float32 else 0)


def test_a_streamed_model_that_computes_no_block_again_is_refused(
    tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(tiny_pipeline_folder, memory="stream")
    monkeypatch.setattr(type(pipe.transformer), "_supports_gradient_checkpointing", False, raising=False)
    with pytest.raises(CalibrationError, match=r"cannot compute single blocks again.*expected --memory full"):
        PipelineRecorder(pipe, SETTINGS).record([PROMPT], [PROMPT])
