"""`compare`: runs two pipelines with the same prompts, seeds and settings, and measures how their images differ."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from omni_convert.convert.calibration.frames import VIDEO_SUFFIX, check_frames_path, write_frames
from omni_convert.convert.calibration.generation import GenerationSettings, run_prompts, set_flow_shift
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.comparison.grid import comparison_image
from omni_convert.convert.comparison.metrics import (
    METRIC_GUIDANCE,
    Image,
    Latents,
    sequence_metrics,
    trajectory_metrics,
)
from omni_convert.convert.execution.memory import PeakMemory, resident_memory
from omni_convert.convert.source.location import Source, resolve_source
from omni_convert.formats.errors import RecipeError
from omni_convert.loaders.memory.allocator import release_free_memory
from omni_convert.loaders.pipeline import load_pipeline
from omni_convert.loaders.report import kernel_report

__all__ = ["Comparison", "Offload", "Run", "RunOptions", "Variant", "compare", "run_variant", "settings_of"]

Result = TypeVar("Result")
#: What rests on the CPU until it runs: whole models, or blocks of models.
Offload = Literal["model", "layerwise"]

#: Small images are enlarged to about this many pixels a side, so that they can be judged by eye.
IMAGE_SIZE = 128


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Attributes:
        model: pipeline folder, Hub repo id, or None for the bundled demo
        quantization: how to quantize while loading; None for a quantized checkpoint
    """

    label: str
    model: str | None
    quantization: str | Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.bfloat16

    @cached_property
    def source(self) -> Source:
        """The model's files, which are downloaded at the first use."""
        return resolve_source(self.model)

    @property
    def model_name(self) -> str:
        """The name of the model in reports."""
        return self.model if self.model is not None else self.source.name


@dataclass(frozen=True)
class RunOptions:
    """Where and how both variants run.

    Attributes:
        offload: None keeps everything on the device
        flow_shift: shift of the scheduler's noise levels; None keeps the scheduler's own
        vae_slicing, vae_tiling: decode images one by one, or in tiles
        memory: as `load_pipeline` takes it; with offloading, models are loaded whole
        pipeline_class: name of the class that the pipelines must have; None for any
    """

    device: str | torch.device = "cpu"
    offload: Offload | None = None
    flow_shift: float | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    memory: str = "full"
    pipeline_class: str | None = None


@dataclass(frozen=True)
class Run:
    """The images of a variant, and their cost.

    Attributes:
        outputs: for each prompt its images, or the frames of its video, as uint8 [height, width, 3]
        settings: what the pipeline ran with, its own defaults included
        seconds: time of each measured run over all prompts
        peak_memory_mb: MiB, in each measured run: CUDA's, or the resident memory of this process on a CPU
        kernels: kernel name → number of quantized layers that run it; empty with offloading, when layers rest elsewhere
        latents: for each prompt its latents after each denoising step; without any if the pipeline does not tell them
    """

    outputs: list[list[Image]]
    settings: GenerationSettings
    seconds: list[float]
    peak_memory_mb: list[float | None]
    kernels: dict[str, int] = field(default_factory=dict)
    latents: list[list[Latents]] = field(default_factory=list)

    @property
    def images(self) -> list[Image]:
        """All images or frames, in the order of the prompts."""
        return [image for output in self.outputs for image in output]

    def generation(self) -> dict[str, Any]:
        """The timing and memory keys of the report."""
        memory = [value for value in self.peak_memory_mb if value is not None]
        return {
            "generation_time_s": self.seconds[-1],
            "avg_generation_time_s": statistics.fmean(self.seconds),
            "per_run_generation_time_s": self.seconds,
            "peak_memory_mb": self.peak_memory_mb[-1],
            "avg_peak_memory_mb": statistics.fmean(memory) if memory else None,
            "max_peak_memory_mb": max(memory, default=None),
            "per_run_peak_memory_mb": self.peak_memory_mb,
        }


@dataclass(frozen=True)
class Comparison:
    """Two runs of the same prompts, and the report about them."""

    reference: Run
    candidate: Run
    report: dict[str, Any]

    def pairs(self) -> list[tuple[Image, Image, str]]:
        """Each image or frame of the reference, that of the candidate, and its prompt, with the number of several."""
        texts = self.report["prompt"] if isinstance(self.report["prompt"], list) else [self.report["prompt"]]
        outputs = self.reference.outputs
        labels = [
            text if len(output) == 1 else f"{text} ({number + 1} of {len(output)})"
            for text, output in zip(texts, outputs, strict=True)
            for number in range(len(output))
        ]
        return list(zip(self.reference.images, self.candidate.images, labels, strict=True))


def run_variant(
    variant: Variant,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    seed: int,
    options: RunOptions | None = None,
    *,
    warmup_runs: int = 0,
    measure_runs: int = 1,
) -> Run:
    """Loads one variant, runs it over the prompts and frees it, so that only one is in memory at a time.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    options = options or RunOptions()
    run = _run_loaded(_load(variant, options), prompts, settings, seed, options, warmup_runs, measure_runs)
    gc.collect()
    release_free_memory()  # or the next variant would be charged for it
    return run


def _run_loaded(
    pipe: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    seed: int,
    options: RunOptions,
    warmup_runs: int,
    measure_runs: int,
) -> Run:
    used = settings.completed(pipe)
    seconds: list[float] = []
    memory: list[float | None] = []
    outputs: list[list[Image]] = []
    latents: dict[int, list[Latents]] = {}
    runs = [(prompt, seed + offset) for offset, prompt in enumerate(prompts)]

    def keep(own_seed: int, step: Tensor) -> None:
        latents.setdefault(own_seed, []).append(step.detach().float().cpu().numpy())

    for run in range(warmup_runs + measure_runs):
        started = time.perf_counter()
        latents.clear()
        frames, peak = _run_once(lambda: run_prompts(pipe, runs, used, on_latents=keep), options.device)
        if run >= warmup_runs:
            seconds.append(time.perf_counter() - started)
            memory.append(peak)
            outputs = [[np.asarray(frame.convert("RGB")) for frame in output] for output in frames]
    layers = kernel_report(pipe).layers if options.offload is None else ()
    kernels = dict(Counter(layer.kernel for layer in layers))
    return Run(outputs, used, seconds, memory, kernels, [latents.get(own_seed, []) for _, own_seed in runs])


def _load(variant: Variant, options: RunOptions) -> Any:
    device = options.device if options.offload is None else None
    pipe = load_pipeline(
        variant.source.path,
        device=device,
        torch_dtype=variant.dtype,
        quantization=variant.quantization,
        memory=options.memory if options.offload is None else "full",
    )
    if options.pipeline_class not in (None, type(pipe).__name__):
        raise RecipeError(
            f"{variant.source.path}: found the pipeline {type(pipe).__name__}, expected {options.pipeline_class} by "
            "--model-class-name; leave it out, since diffusers reads the class from the model"
        )
    if options.flow_shift is not None:
        set_flow_shift(pipe, options.flow_shift)
    if options.vae_slicing:
        pipe.vae.enable_slicing()
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=options.device)
    elif options.offload == "layerwise":
        pipe.enable_group_offload(torch.device(options.device), num_blocks_per_group=1)
    return pipe


def _run_once(run: Callable[[], Result], device: str | torch.device) -> tuple[Result, float | None]:
    """The result of a run, and its peak memory in MiB; None where the system does not report it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return run(), torch.cuda.max_memory_allocated(device) / 2**20
    with PeakMemory(resident_memory) as peak:
        result = run()
    return result, peak.size / 2**20 or None


def compare(
    reference: Variant,
    candidate: Variant,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    options: RunOptions | None = None,
    *,
    seed: int = 42,
    task: str = "t2i",
    warmup_runs: int = 0,
    measure_runs: int = 1,
    save_to: Path | None = None,
    fps: int = 24,
) -> Comparison:
    """Runs both variants and compares them; the report has the keys of vLLM-Omni's comparison tool.

    Args:
        task: `t2i`, `t2v`, `i2i` or `i2v`: what the pipeline starts from, and what it makes
        save_to: folder for every image, or video, and for `comparison.png`
        fps: frames per second of saved videos

    Raises:
        CheckpointError: a model cannot be loaded.
        OutputError: videos are to be saved, and what writes them is not installed.
        RecipeError: the variants give different numbers or sizes of images; or prompts have images, and the task none,
            or the other way round.
    """
    _check_images(prompts, task)
    makes_videos = task.endswith("v")
    if save_to is not None and makes_videos:
        check_frames_path(Path(f"video{VIDEO_SUFFIX}"))
    runs = [
        run_variant(variant, prompts, settings, seed, options, warmup_runs=warmup_runs, measure_runs=measure_runs)
        for variant in (reference, candidate)
    ]
    texts = [prompt.text for prompt in prompts]
    report: dict[str, Any] = {
        "model": candidate.model_name,
        "prompt": texts[0] if len(texts) == 1 else texts,
        "negative_prompt": settings.negative_prompt,
        "seed": seed,
        "warmup_runs": warmup_runs,
        "measure_runs": measure_runs,
        "variant_configs": {variant.label: _describe(variant) for variant in (reference, candidate)},
        "sampling_kwargs": _sampling(task, runs[0], options),
        "metric_guidance": METRIC_GUIDANCE,
        "output_metrics": sequence_metrics(runs[0].images, runs[1].images),
        "trajectory_metrics": trajectory_metrics(runs[0].latents, runs[1].latents),
    }
    for variant, run in zip((reference, candidate), runs, strict=True):
        report[f"{variant.label}_generation"] = run.generation()
        report[f"{variant.label}_kernels"] = run.kernels
    if save_to is not None:
        report["saved_outputs"] = {
            variant.label: _save(run, save_to / variant.label, fps if makes_videos else None)
            for variant, run in zip((reference, candidate), runs, strict=True)
        }
        shown = [_images_shown(run, makes_videos) for run in runs]
        scale = max(1, IMAGE_SIZE // shown[0][0].shape[1])
        comparison_image(shown[0], {candidate.label: shown[1]}, scale=scale).save(save_to / "comparison.png")
    return Comparison(runs[0], runs[1], report)


def _describe(variant: Variant) -> dict[str, Any]:
    quantization = variant.quantization
    return {
        "label": variant.label,
        "model": variant.model_name,
        "quantization": quantization if isinstance(quantization, str) else None,
        "quantization_config": dict(quantization) if isinstance(quantization, Mapping) else None,
        "diffusion_load_format": "default",
    }


def _check_images(prompts: Sequence[Prompt], task: str) -> None:
    for prompt in prompts:
        if task.startswith("i") and prompt.image is None:
            raise RecipeError(f"--image: found none for '{prompt.text:.40}', but the task {task} starts from an image")
        if task.startswith("t") and prompt.image is not None:
            raise RecipeError(
                f"--image: found {prompt.image}, but the task {task} starts from text; use --task i2{task[-1]}"
            )


def _sampling(task: str, run: Run, options: RunOptions | None) -> dict[str, Any]:
    """The settings with which the pipelines ran, under the names of vLLM-Omni's tool."""
    height, width, _ = run.images[0].shape
    return {
        "task": task,
        "width": width,
        "height": height,
        "num_frames": len(run.outputs[0]) if task.endswith("v") else None,
        "num_inference_steps": run.settings.steps,
        "guidance_scale": run.settings.guidance_scale,
        "cfg_scale": run.settings.guidance_scale,
        "guidance_scale_2": run.settings.guidance_scale_2,
        "flow_shift": options.flow_shift if options is not None else None,
        "num_images_per_prompt": run.settings.images_per_prompt,
        "step_execution": False,
    }


def _save(run: Run, folder: Path, fps: int | None) -> list[str]:
    """Saves a variant's images or, with `fps`, the video of each prompt with its first, middle and last frame."""
    from PIL import Image as PillowImage

    folder.mkdir(parents=True, exist_ok=True)
    if fps is None:
        named = {folder / f"image_{index}.png": [image] for index, image in enumerate(run.images)}
    else:
        named = {}
        for place, video in enumerate(run.outputs):
            number = f"_{place}" if len(run.outputs) > 1 else ""
            named[folder / f"video{number}{VIDEO_SUFFIX}"] = video
            for index in _shown(video):
                named[folder / f"frame{number}_{index}.png"] = [video[index]]
    for path, images in named.items():
        write_frames([PillowImage.fromarray(image) for image in images], path, fps or 1)
    return [str(path) for path in named]


def _shown(video: Sequence[Image]) -> list[int]:
    """Indices of a video's first, middle and last frame."""
    return sorted({0, len(video) // 2, len(video) - 1})


def _images_shown(run: Run, are_videos: bool) -> list[Image]:
    return [output[index] for output in run.outputs for index in (_shown(output) if are_videos else range(len(output)))]


def settings_of(variant: Variant, overrides: Mapping[str, Any]) -> GenerationSettings:
    """The caller's settings, completed by those that the variant's pipeline declares."""
    return GenerationSettings.for_pipeline(variant.source.path, overrides)
