"""`generate` and `compare` with the options of serving engines, on tiny pipelines of the real classes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

from omni_convert.convert.calibration.generation import GenerationSettings
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.cli.main import main
from omni_convert.convert.comparison.comparison import RunOptions, Variant, run_variant

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers|transformers"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # imageio leaves its pipes open
]

SMALL = ("--steps", "2", "--width", "32", "--height", "32")
VIDEO = (*SMALL, "--num-frames", "5")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    lines = result.stderr.splitlines()
    assert result.exit_code == 1, result.output
    assert len(lines) == 1, result.output
    return lines[0]


def wan_parts(tokenizers: Path, in_channels: int) -> dict[str, Any]:
    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=in_channels,
            out_channels=16,
            text_dim=32,
            ffn_dim=32,
            freq_dim=32,
        )

    return {
        "tokenizer": AutoTokenizer.from_pretrained(tokenizers / "tokenizer"),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        ).eval(),
        "vae": diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": transformer(),
        "transformer_2": transformer(),
        "boundary_ratio": 0.9,
    }


@pytest.fixture(scope="module")
def wan(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts that make videos from texts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan")
    diffusers.WanPipeline(**wan_parts(tiny_pipeline_folder, 16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan_i2v(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts that make videos from an image and a text."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan-i2v")
    diffusers.WanImageToVideoPipeline(**wan_parts(tiny_pipeline_folder, 36)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ltx_i2v(video_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx-i2v")
    video_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def klein(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that makes images from texts, and edits images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("klein")
    encoder = Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4
        ),
        text_encoder=Qwen3ForCausalLM(encoder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(tiny_pipeline_folder / "tokenizer"),
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=False,
        ),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_every_frame_of_a_video_is_written(suffix: str, wan: Path, tmp_path: Path, import_peer: Any) -> None:
    video = tmp_path / f"out{suffix}"
    if suffix == ".mp4":
        import_peer("imageio_ffmpeg")
    result = run("generate", wan, "--prompt", "a star", "-o", video, *VIDEO, "--fps", "10")
    assert result.exit_code == 0, result.output
    assert f"{video}: 5 images of 32x32, 2 steps" in result.stdout
    frames, seconds = read_video(video)
    assert len(frames) == 5
    assert frames[0].shape == (32, 32, 3)
    assert seconds == pytest.approx(0.5)
    if suffix == ".webp":  # lossless, so that it has what the pipeline made
        assert run("generate", wan, "--prompt", "a star", "-o", tmp_path / "out.png", *VIDEO).exit_code == 0
        files = sorted(tmp_path.glob("*.png"))
        assert [file.name for file in files] == [f"out_{index}.png" for index in range(5)]
        assert all(
            np.array_equal(np.asarray(Image.open(file)), frame) for file, frame in zip(files, frames, strict=True)
        )


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    """The frames, and their duration in seconds."""
    if path.suffix == ".mp4":
        import imageio

        with imageio.get_reader(path) as reader:
            return [np.asarray(frame) for frame in reader], reader.get_meta_data()["duration"]
    with Image.open(path) as video:
        frames, seconds = [], 0.0
        for index in range(video.n_frames):
            video.seek(index)
            frames.append(np.asarray(video.convert("RGB")))
            seconds += video.info["duration"] / 1000
        return frames, seconds


@pytest.mark.skipif(find_spec("imageio_ffmpeg") is not None, reason="it is installed")
def test_what_writes_videos_is_asked_for_before_any_work(wan: Path, tmp_path: Path) -> None:
    result = run("generate", wan, "--prompt", "a star", "-o", tmp_path / "out.mp4", *VIDEO)
    assert "pip install 'omni-convert[video]', or name a .gif or .webp file" in error_line(result)
    comparing = ("compare", "--model", wan, "--task", "t2v", "--output-json", tmp_path / "a.json", *VIDEO)
    assert "omni-convert[video]" in error_line(run(*comparing, "--save-output-dir", tmp_path / "saved"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("ftfy") is not None, reason="it is installed")
def test_a_package_that_a_pipeline_lacks_is_named_with_its_extra(wan_i2v: Path, tmp_path: Path, picture: Path) -> None:
    result = run("generate", wan_i2v, "--prompt", "it turns", "--image", picture, "-o", tmp_path / "out.gif", *VIDEO)
    assert error_line(result) == (
        "Error: WanImageToVideoPipeline: found no package ftfy, which it needs; pip install 'omni-convert[pipelines]'"
    )


def test_a_video_starts_from_an_image(ltx_i2v: Path, tmp_path: Path) -> None:
    videos = []
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.jpg")
        video = tmp_path / f"{colour}.webp"
        options = ("--prompt", "it turns", "--image", tmp_path / f"{colour}.jpg", *SMALL, "--num-frames", "9")
        result = run("generate", ltx_i2v, *options, "-o", video)
        assert result.exit_code == 0, result.output
        videos.append(read_video(video)[0])
    assert [len(video) for video in videos] == [9, 9]
    assert not np.array_equal(videos[0][0], videos[1][0])


def test_compare_videos_that_start_from_an_image(ltx_i2v: Path, tmp_path: Path, picture: Path) -> None:
    options = ("--task", "i2v", "--prompt", "it turns", "--image", picture, *SMALL, "--num-frames", "9")
    _, report = compare(ltx_i2v, tmp_path / "a.json", *options)
    assert report["sampling_kwargs"]["task"] == "i2v"
    assert report["sampling_kwargs"]["num_frames"] == report["output_metrics"]["num_frames"] == 9


@pytest.mark.parametrize(
    ("pipeline", "has_image"),
    [("wan", False), ("ltx_i2v", True), ("klein", True), ("tiny_pipeline_folder", False)],
    ids=str,
)
def test_streamed_prompts_give_what_each_gives_alone(
    pipeline: str, has_image: bool, picture: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(pipeline)
    prompts = [Prompt(text, picture if has_image else None) for text in ("a star", "a longer prompt about a ring")]
    settings = GenerationSettings(steps=3, width=32, height=32, frames=5 if pipeline in ("wan", "ltx_i2v") else None)
    full, streamed = (
        run_variant(Variant("a", str(folder)), prompts, settings, 0, RunOptions(memory=memory)).images
        for memory in ("full", "stream")
    )
    assert all(np.array_equal(*pair) for pair in zip(full, streamed, strict=True))


def test_memory_is_checked_before_any_work(tmp_path: Path) -> None:
    for command in (["generate", "--prompt", "a"], ["compare", "--output-json", "a.json"], ["calibrate"], []):
        assert "expected auto, full, stream or stream:GB" in error_line(run(*command, "--memory", "stream:x"))


def test_an_image_is_edited(klein: Path, tmp_path: Path, picture: Path) -> None:
    options = ("--prompt", "a star", *SMALL)
    assert run("generate", klein, "-o", tmp_path / "without.png", *options).exit_code == 0
    assert run("generate", klein, "-o", tmp_path / "with.png", "--image", picture, *options).exit_code == 0
    without, edited = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("without", "with"))
    assert without.shape == edited.shape == (32, 32, 3)
    assert not np.array_equal(without, edited)


def test_several_images_of_a_prompt(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    options = ("--prompt", "a star", *SMALL, "--num-images-per-prompt", "2")
    result = run("generate", tiny_pipeline_folder, "-o", tmp_path / "out.png", *options)
    assert result.exit_code == 0, result.output
    images = [np.asarray(Image.open(tmp_path / f"out_{index}.png")) for index in (0, 1)]
    assert not np.array_equal(*images)


def test_an_image_that_is_not_there(klein: Path, tmp_path: Path) -> None:
    result = run("generate", klein, "--prompt", "a", "--image", tmp_path / "absent.png", "-o", tmp_path / "out.png")
    assert "--image: image " in error_line(result)
    assert "absent.png missing" in result.stderr


def compare(folder: Path, output: Path, *options: object) -> tuple[Result, dict[str, Any]]:
    result = run("compare", "--model", folder, "--candidate-quantization", "int8", "--output-json", output, *options)
    assert result.exit_code == 0, result.output
    return result, json.loads(output.read_text())


def test_compare_videos_with_the_settings_of_serving_engines(wan: Path, tmp_path: Path, import_peer: Any) -> None:
    import_peer("imageio_ffmpeg")
    options = ("--task", "t2v", "--prompt", "a star", *VIDEO, "--fps", "5", "--enforce-eager")
    options += ("--tensor-parallel-size", "1", "--candidate-load-format", "default", "--vae-use-tiling")
    options += ("--no-step-execution", "--timesteps-shift", "1.0", "--cfg-schedule", "constant")
    options += ("--use-system-prompt", "None", "--model-class-name", "WanPipeline")
    options += ("--guidance-scale", "3", "--guidance-scale-2", "2", "--flow-shift", "5", "--enable-cpu-offload")
    saved = tmp_path / "saved"
    result, report = compare(wan, tmp_path / "a.json", *options, "--device", "cpu", "--save-output-dir", saved)
    assert result.stderr == "Note: --enable-cpu-offload has no use here: the pipeline runs on the CPU\n"
    assert report["sampling_kwargs"] == {
        "task": "t2v",
        "width": 32,
        "height": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "cfg_scale": 3.0,
        "guidance_scale_2": 2.0,
        "flow_shift": 5.0,
        "num_images_per_prompt": 1,
        "step_execution": False,
    }
    names = ["video.mp4", "frame_0.png", "frame_2.png", "frame_4.png"]
    assert report["saved_outputs"]["candidate"] == [str(saved / "candidate" / name) for name in names]
    frames, seconds = read_video(saved / "reference" / "video.mp4")
    assert (len(frames), seconds) == (5, pytest.approx(1.0))
    assert report["output_metrics"]["num_frames"] == 5


@pytest.mark.parametrize("option", [("--flow-shift", "9"), ("--guidance-scale-2", "9")])
def test_settings_reach_the_pipeline(wan: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    frames = []
    for extra in ((), option):
        video = tmp_path / f"{len(extra)}.webp"
        options = (*VIDEO[2:], "--steps", "3", "--guidance-scale", "2", *extra)
        assert run("generate", wan, "--prompt", "a star", "-o", video, *options).exit_code == 0
        frames.append(np.stack(read_video(video)[0]))
    assert not np.array_equal(*frames)


def test_compare_edited_images(klein: Path, tmp_path: Path, picture: Path) -> None:
    options = ("--task", "i2i", "--prompt", "a star", *SMALL, "--image", picture, "--num-images-per-prompt", "2")
    saved = tmp_path / "saved"
    result, report = compare(klein, tmp_path / "a.json", *options, "--quiet", "--save-output-dir", saved)
    assert result.output == ""
    assert report["sampling_kwargs"]["task"] == "i2i"
    assert report["sampling_kwargs"]["num_images_per_prompt"] == report["output_metrics"]["num_images"] == 2
    assert report["sampling_kwargs"]["guidance_scale"] == 4.0, "the pipeline's own default was used"
    for side in ("reference_generation", "candidate_generation"):
        assert 50 < report[side]["max_peak_memory_mb"] < 100_000
    assert sorted(path.name for path in saved.rglob("*.png")) == sorted(
        ["image_0.png", "image_1.png"] * 2 + ["comparison.png"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "i2i"), "found none for 'a', but the task i2i starts from an image"),
        (("--task", "t2i", "--image", "PICTURE"), "the task t2i starts from text; use --task i2i"),
        (("--image", "absent.png"), "absent.png missing"),
        (("--timesteps-shift", "3"), "--timesteps-shift: found 3.0, but no pipeline of diffusers has such a parameter"),
        (("--cfg-schedule", "linear"), "--cfg-schedule: found linear, but no pipeline of diffusers has such"),
        (("--use-norm",), "--use-norm: found True, but no pipeline of diffusers has such a parameter"),
        (
            ("--use-system-prompt", "dynamic"),
            "found dynamic, but it names a system prompt of HunyuanImage-3.0",
        ),
        (("--frame-rate", "25"), "frame_rate: found 25.0, but Flux2KleinPipeline has no such setting"),
        (("--system-prompt", "Draw."), "system_prompt: found 'Draw.', but Flux2KleinPipeline has no such setting"),
        (("--model-class-name", "FluxPipeline"), "found the pipeline Flux2KleinPipeline, expected FluxPipeline"),
        (
            ("--tensor-parallel-size", "2"),
            "--tensor-parallel-size: found 2, but one device runs each model, expected 1",
        ),
        (("--ulysses-degree", "4"), "--ulysses-degree: found 4"),
        (("--enable-cpu-offload", "--enable-layerwise-offload"), "expected one of the two"),
        (("--flow-shift", "3", "--model", "DYNAMIC"), "computes its shift from the size of the image"),
    ],
)
def test_what_does_not_fit_a_comparison(
    options: tuple[str, ...], message: str, klein: Path, tmp_path: Path, picture: Path
) -> None:
    dynamic = tmp_path / "dynamic"
    if "DYNAMIC" in options:
        dynamic.mkdir()
        for entry in klein.iterdir():
            if entry.name != "scheduler":
                (dynamic / entry.name).symlink_to(entry)
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(dynamic / "scheduler")
    given = [{"PICTURE": picture, "DYNAMIC": dynamic}.get(option, option) for option in options]
    result = run("compare", "--model", klein, "--prompt", "a", "--output-json", tmp_path / "a.json", *SMALL, *given)
    assert message in error_line(result)
    assert not (tmp_path / "a.json").exists()
