"""One way to run every pipeline: settings by signature, noise by prompt, nothing of the caller's changed."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from omni_convert.convert.calibration import generation
from omni_convert.convert.calibration.generation import DEFAULTS_FILE, GenerationSettings, run_pipeline
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.formats.errors import CheckpointError, RecipeError

SMALL = GenerationSettings(steps=2, width=32, height=32, guidance_scale=2.0)
PROMPTS = [Prompt("a red circle"), Prompt("a blue square on the left")]


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder: Path) -> Any:
    return diffusers.ZImagePipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)


def pixels(images: list[list[Image.Image]]) -> list[np.ndarray]:
    return [np.asarray(frame) for frames in images for frame in frames]


def test_an_image_depends_on_its_prompt_and_seed_alone(pipe: Any) -> None:
    together = pixels(run_pipeline(pipe, PROMPTS, SMALL, 7))
    alone = [pixels(run_pipeline(pipe, [prompt], SMALL, 7 + place))[0] for place, prompt in enumerate(PROMPTS)]
    assert [np.array_equal(*pair) for pair in zip(together, alone, strict=True)] == [True, True]
    assert not np.array_equal(alone[0], pixels(run_pipeline(pipe, PROMPTS[:1], SMALL, 8))[0])


def test_it_is_the_image_that_the_pipeline_itself_makes(pipe: Any) -> None:
    direct = pipe(
        prompt="a red circle",
        num_inference_steps=2,
        width=32,
        height=32,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.array_equal(pixels(run_pipeline(pipe, PROMPTS[:1], SMALL, 7))[0], np.asarray(direct))


def test_the_callers_prompts_and_pipeline_are_left_alone(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = list(PROMPTS)
    pipe.set_progress_bar_config(desc="mine")
    run_pipeline(pipe, prompts, SMALL, 0)
    assert prompts == PROMPTS
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert capsys.readouterr().err == ""


def test_steps_are_reported_in_order(pipe: Any) -> None:
    steps: list[int] = []
    images = run_pipeline(pipe, PROMPTS, SMALL, 0, on_step=steps.append, decode=False)
    assert steps == [0, 1, 0, 1]
    assert images == [[], []]


def test_a_video_from_an_image(video_pipeline: Any, tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{colour}.png")
    settings = GenerationSettings(steps=2, width=32, height=32, frames=9, guidance_scale=2.0)
    prompts = [Prompt("it turns", tmp_path / f"{colour}.png") for colour in ("red", "blue")]
    videos = run_pipeline(video_pipeline, prompts, settings, 0)
    assert [len(frames) for frames in videos] == [9, 9]
    assert videos[0][0].size == (32, 32)
    assert not np.array_equal(*(np.asarray(frames[0]) for frames in videos))


def test_the_frame_rate_reaches_the_pipeline(video_pipeline: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "image.png")
    prompt = Prompt("a circle", tmp_path / "image.png")
    slow, usual, default = (
        pixels(run_pipeline(video_pipeline, [prompt], GenerationSettings(2, 32, 32, 9, frame_rate=rate), 0))
        for rate in (2.0, 25.0, None)
    )
    assert np.array_equal(usual, default)  # the pipeline's own is 25
    assert not np.array_equal(slow, usual)


def test_images_where_none_are_taken_and_none_where_one_is_needed(
    pipe: Any, video_pipeline: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(RecipeError, match=r"black\.png: found an image, but ZImagePipeline takes none"):
        run_pipeline(pipe, [Prompt("a", tmp_path / "black.png")], SMALL, 0)
    with pytest.raises(RecipeError, match=r"tone\.wav: found a sound, but ZImagePipeline takes none"):
        run_pipeline(pipe, [Prompt("a", audio=tmp_path / "tone.wav")], SMALL, 0)
    with pytest.raises(RecipeError, match="LTXImageToVideoPipeline needs one; use JSON Lines"):
        run_pipeline(video_pipeline, [Prompt("a")], SMALL, 0)


def test_settings_that_a_pipeline_does_not_take(pipe: Any) -> None:
    with pytest.raises(RecipeError, match="frames: found 9, but ZImagePipeline has no such setting"):
        run_pipeline(pipe, PROMPTS, GenerationSettings(frames=9), 0)
    with pytest.raises(RecipeError, match="ZImagePipeline: Height must be divisible by 4"):
        run_pipeline(pipe, PROMPTS, GenerationSettings(steps=1, width=32, height=30), 0)


@pytest.mark.parametrize(
    ("pipeline_class", "name"),
    [
        ("ZImagePipeline", "guidance_scale"),
        ("FluxPipeline", "guidance_scale"),
        ("Flux2Pipeline", "guidance_scale"),
        ("WanPipeline", "guidance_scale"),
        ("HunyuanVideoPipeline", "guidance_scale"),
        ("QwenImagePipeline", "true_cfg_scale"),
        ("QwenImageEditPipeline", "true_cfg_scale"),
        ("HunyuanImagePipeline", "distilled_guidance_scale"),
    ],
)
def test_what_pipelines_call_the_guidance_scale(pipeline_class: str, name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters
    assert generation._parameter_name("guidance_scale", parameters) == name


def test_a_true_guidance_scale_comes_with_the_negative_prompt_that_it_needs() -> None:
    pipeline = diffusers.QwenImagePipeline.__new__(diffusers.QwenImagePipeline)
    parameters = inspect.signature(diffusers.QwenImagePipeline.__call__).parameters

    def arguments(**settings: Any) -> dict[str, Any]:
        return generation._setting_arguments(pipeline, parameters, GenerationSettings(**settings))

    assert arguments(guidance_scale=4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    assert arguments(guidance_scale=1.0) == {"true_cfg_scale": 1.0}
    assert arguments(guidance_scale=4.0, negative_prompt="x") == {"true_cfg_scale": 4.0, "negative_prompt": "x"}


def test_settings_of_a_pipeline_folder_and_what_overrides_them(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    assert GenerationSettings.for_pipeline(tiny_pipeline_folder) == SMALL
    changed = GenerationSettings.for_pipeline(tiny_pipeline_folder, {"steps": 5, "width": None})
    assert (changed.steps, changed.width) == (5, 32)
    assert GenerationSettings.for_pipeline(tmp_path) == GenerationSettings()


def test_the_signature_completes_the_settings(pipe: Any) -> None:
    assert GenerationSettings(width=64).completed(pipe) == GenerationSettings(
        steps=50, width=64, guidance_scale=5.0, max_sequence_length=512
    )


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"height": "64"}', '{"num_inference_steps": 0}', '{"width": 1.5}', '{"height": true}']
)
def test_a_damaged_defaults_file(tmp_path: Path, content: str) -> None:
    (tmp_path / DEFAULTS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=DEFAULTS_FILE):
        GenerationSettings.for_pipeline(tmp_path)


def test_unknown_defaults_are_for_others(tmp_path: Path) -> None:
    (tmp_path / DEFAULTS_FILE).write_text(json.dumps({"height": 64, "scheduler_shift": 3}))
    assert GenerationSettings.for_pipeline(tmp_path) == GenerationSettings(height=64)


def test_prompts_are_cut_to_the_declared_length(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / DEFAULTS_FILE).write_text(json.dumps({"max_sequence_length": 4}))
    settings = GenerationSettings.for_pipeline(tmp_path, {"steps": 1, "width": 32, "height": 32})
    beginnings = [Prompt("a red circle at the top"), Prompt("a red circle on the left")]
    cut, other = (pixels(run_pipeline(pipe, [prompt], settings, 0))[0] for prompt in beginnings)
    assert np.array_equal(cut, other)
    whole = pixels(run_pipeline(pipe, beginnings[:1], GenerationSettings(steps=1, width=32, height=32), 0))[0]
    assert not np.array_equal(cut, whole)


@pytest.mark.parametrize("name", ["steps", "width", "height", "frames", "max_sequence_length"])
def test_numbers_are_positive(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: found 0"):
        GenerationSettings(**{name: 0})
