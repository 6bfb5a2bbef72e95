"""`compare`: runs two pipelines with the same prompts, seeds and settings, and measures how their images differ."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_convert.convert.calibration.generation import GenerationSettings, run_pipeline
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.comparison.grid import comparison_image
from omni_convert.convert.comparison.metrics import METRIC_GUIDANCE, Image, sequence_metrics
from omni_convert.convert.source.location import Source, resolve_source
from omni_convert.loaders.pipeline import load_pipeline
from omni_convert.loaders.report import kernel_report

__all__ = ["Comparison", "Run", "Variant", "compare", "run_variant"]

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
class Run:
    """The images of a variant, and their cost.

    Attributes:
        images: one uint8 [height, width, 3] per image or frame, in the order of the prompts
        seconds: time of each measured run over all prompts
        peak_memory_mb: CUDA's peak memory in each measured run; None on a CPU
        kernels: kernel name → number of quantized layers that run it
    """

    images: list[Image]
    seconds: list[float]
    peak_memory_mb: list[float | None]
    kernels: dict[str, int] = field(default_factory=dict)

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


def run_variant(
    variant: Variant,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    warmup_runs: int = 0,
    measure_runs: int = 1,
) -> Run:
    """Loads one variant, runs it over the prompts and frees it, so that only one is in memory at a time.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    pipe = load_pipeline(
        variant.source.path, device=device, torch_dtype=variant.dtype, quantization=variant.quantization
    )
    on_cuda = torch.device(device).type == "cuda"
    seconds: list[float] = []
    memory: list[float | None] = []
    images: list[Image] = []
    for run in range(warmup_runs + measure_runs):
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        outputs = run_pipeline(pipe, prompts, settings, seed)
        if run >= warmup_runs:
            seconds.append(time.perf_counter() - started)
            memory.append(torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else None)
            images = [np.asarray(frame.convert("RGB")) for output in outputs for frame in output]
    kernels: dict[str, int] = {}
    for layer in kernel_report(pipe).layers:
        kernels[layer.kernel] = kernels.get(layer.kernel, 0) + 1
    del pipe
    gc.collect()
    return Run(images, seconds, memory, kernels)


def compare(
    reference: Variant,
    candidate: Variant,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    seed: int = 42,
    task: str = "t2i",
    device: str | torch.device = "cpu",
    warmup_runs: int = 0,
    measure_runs: int = 1,
    save_to: Path | None = None,
) -> Comparison:
    """Runs both variants and compares them; the report has the keys of vLLM-Omni's comparison tool.

    Args:
        save_to: folder for every image and for `comparison.png`

    Raises:
        CheckpointError: a model cannot be loaded.
        RecipeError: the variants give different numbers or sizes of images.
    """
    runs = [
        run_variant(variant, prompts, settings, seed, device=device, warmup_runs=warmup_runs, measure_runs=measure_runs)
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
        "sampling_kwargs": {
            "task": task,
            "width": settings.width,
            "height": settings.height,
            "num_frames": None if task == "t2i" else settings.frames,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "cfg_scale": settings.guidance_scale,
            "guidance_scale_2": None,
            "flow_shift": None,
            "num_images_per_prompt": 1,
            "step_execution": False,
        },
        "metric_guidance": METRIC_GUIDANCE,
        "output_metrics": sequence_metrics(runs[0].images, runs[1].images),
    }
    for variant, run in zip((reference, candidate), runs, strict=True):
        report[f"{variant.label}_generation"] = run.generation()
        report[f"{variant.label}_kernels"] = run.kernels
    if save_to is not None:
        report["saved_outputs"] = _save(save_to, reference, candidate, runs)
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


def _save(folder: Path, reference: Variant, candidate: Variant, runs: Sequence[Run]) -> dict[str, list[str]]:
    from PIL import Image as PillowImage

    saved: dict[str, list[str]] = {}
    for variant, run in zip((reference, candidate), runs, strict=True):
        target = folder / variant.label
        target.mkdir(parents=True, exist_ok=True)
        saved[variant.label] = []
        for index, image in enumerate(run.images):
            path = target / f"image_{index}.png"
            PillowImage.fromarray(image).save(path)
            saved[variant.label].append(str(path))
    scale = max(1, IMAGE_SIZE // runs[0].images[0].shape[1])
    grid = comparison_image(runs[0].images, {candidate.label: runs[1].images}, scale=scale)
    grid.save(folder / "comparison.png")
    return saved


def settings_of(variant: Variant, overrides: Mapping[str, Any]) -> GenerationSettings:
    """The caller's settings, completed by those that the variant's pipeline declares."""
    return GenerationSettings.for_pipeline(variant.source.path, overrides)
