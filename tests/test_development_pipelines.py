"""The trained pipelines on which calibration is judged, and the VAE that two of them share."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
import torch
from development_pictures import Flight, Pictures
from development_vae import build_vae, encoded_means, single_frames, video_vae

from omni_convert.convert.calibration.generation import GenerationSettings, run_prompts
from omni_convert.convert.calibration.pipeline_recorder import calibrate
from omni_convert.convert.calibration.prompts import read_prompts
from omni_convert.loaders.pipeline import load_pipeline

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(("name", "frames", "size"), [("flux", 1, 64), ("qwen_image", 1, 64), ("wan", 9, 48)])
def test_a_pipeline_draws_a_picture_or_a_video(name: str, frames: int, size: int) -> None:
    pipe = load_pipeline(DATA / name, "cpu")
    settings = GenerationSettings.for_pipeline(DATA / name, {"steps": 1})
    prompt = read_prompts(DATA / f"{name}_prompts.txt")[0]
    [images] = run_prompts(pipe, [(prompt, 0)], settings)
    assert [image.size for image in images] == [(size, size)] * frames


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_the_inputs_of_most_layers_have_outlier_channels(name: str) -> None:
    settings = GenerationSettings.for_pipeline(DATA / name, {"steps": 2})
    prompts = read_prompts(DATA / f"{name}_prompts.txt")
    recorded = calibrate(load_pipeline(DATA / name, "cpu"), prompts[:2], settings)
    ratios = [float(layer.channels.max() / layer.channels.median()) for layer in recorded.layers.values()]
    assert statistics.median(ratios) >= 20
    runs = next(iter(recorded.layers.values())).row_runs()
    assert runs is not None
    assert (len(runs[:, 0].unique()), sorted(runs[:, 1].unique().tolist())) == (2, [0, 1])


@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan"])
def test_calibration_and_evaluation_share_no_prompt(name: str) -> None:
    calibration, evaluation = (
        {prompt.text for prompt in read_prompts(DATA / f"{name}_{kind}.txt")}
        for kind in ("prompts", "evaluation_prompts")
    )
    assert (len(calibration), len(evaluation)) == (40, 16)
    assert not calibration & evaluation


def test_the_pipeline_drops_the_template_and_nothing_of_the_caption() -> None:
    pipe = load_pipeline(DATA / "qwen_image", "cpu")
    before, after = pipe.prompt_template_encode.split("{}")
    assert len(pipe.tokenizer(before).input_ids) == pipe.prompt_template_encode_start_idx
    embeds, _ = pipe.encode_prompt("pink house")
    assert embeds.shape[1] == len(pipe.tokenizer(f"pink house{after}").input_ids)


@torch.no_grad()
def test_a_video_is_every_second_of_its_frames() -> None:
    vae = build_vae()
    _, videos = Pictures(Flight.sample).draw(random.Random(0), 1)
    with single_frames(vae):
        alone = encoded_means(vae, videos[0, ::2, :, None])
    video = video_vae(vae)
    latents = video.encode(videos.transpose(1, 2)).latent_dist.mean
    torch.testing.assert_close(latents[0], alone[:, :, 0].transpose(0, 1), atol=1e-4, rtol=1e-4)
    frames = video.decode(latents).sample[0]
    torch.testing.assert_close(frames[:, 1::2], frames[:, 2::2])


def test_the_floor_stands_still_in_the_vaes_frames_and_rises_in_those_of_wan() -> None:
    still, rising = (Pictures(sample).draw(random.Random(0), 8)[1] for sample in (Flight.sample, Flight.sample_rising))
    assert torch.equal(floor_rows(still), floor_rows(still[:, :1]).expand(-1, still.shape[1]))
    assert (floor_rows(rising).diff(dim=1) > 0).all()


def floor_rows(videos: torch.Tensor) -> torch.Tensor:
    """Rows of floor at the left edge of each frame [videos, frames]."""
    edge = videos[..., 0]
    return ((edge - edge[..., -1:]).abs().amax(2) < 0.02).sum(-1)
