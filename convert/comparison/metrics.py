"""Metrics of the difference between images, and the thresholds that serving engines set for quantized pipelines.

All metrics are over uint8 RGB in double precision; names, definitions and thresholds are those of vLLM-Omni's
`compare_diffusion_trajectory_similarity`, so that reports can be read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_convert.formats.errors import RecipeError

__all__ = [
    "METRIC_GUIDANCE",
    "Image",
    "Latents",
    "image_metrics",
    "rmse",
    "sequence_metrics",
    "summary_of",
    "trajectory_metrics",
]

#: uint8 [height, width, 3]
Image = NDArray[np.uint8]
#: float32, in the shape that the pipeline has
Latents = NDArray[np.float32]

PEAK = 255.0
#: Metrics that the terminal shows.
SHOWN = ("psnr_db", "mae", "cosine_similarity", "relative_l2")

METRIC_GUIDANCE: dict[str, Any] = {
    "scope": "final images or frames, uint8 RGB, same prompt, seed and settings through both pipelines",
    "descriptions": {
        "psnr_db": "peak signal-to-noise ratio in dB; higher is closer, null for equal images",
        "mae": "mean absolute difference in grey levels; lower is closer",
        "cosine_similarity": "cosine of the angle between the two images as vectors; higher is closer",
        "relative_l2": "norm of the difference over that of the reference; lower is closer, null for a black reference",
    },
    "recommended_thresholds": {
        "output_images_or_frames_uint8": {
            "psnr_db": {
                "recommended_min": 20,
                "good_min": 25,
                "strict_min": 30,
                "note": "below 20 is visibly different",
            },
            "mae": {"recommended_max": 12, "good_max": 6, "strict_max": 3, "note": "in grey levels of 255"},
            "cosine_similarity": {"recommended_min": 0.98, "strict_min": 0.995, "note": "insensitive to brightness"},
            "relative_l2": {"recommended_max": 0.20, "strict_max": 0.08, "note": "relative to the reference image"},
        },
        "performance": {
            "avg_generation_time_ratio_candidate_over_reference": {
                "recommended_max": 1.10,
                "note": "above 1 the candidate is slower",
            },
            "max_peak_memory_ratio_candidate_over_reference": {
                "recommended_max": 1.00,
                "target_max": 0.95,
                "note": "above 1 the candidate needs more memory",
            },
        },
    },
}


def image_metrics(reference: Image, candidate: Image) -> dict[str, float]:
    """All metrics of one image (or of one stack of images) against another of the same shape.

    Raises:
        RecipeError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise RecipeError(
            f"compare: found images of {candidate.shape} for a reference of {reference.shape}, expected one size"
        )
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    difference = a - b
    mse = float(np.mean(difference**2))
    l2, reference_norm, candidate_norm = (float(np.linalg.norm(vector)) for vector in (difference, a, b))
    return {
        "cosine_similarity": _cosine(float(a @ b), reference_norm, candidate_norm),
        "mae": float(np.mean(np.abs(difference))),
        "mse": mse,
        "rmse": math.sqrt(mse),
        "max_abs": float(np.max(np.abs(difference), initial=0.0)),
        "l2": l2,
        "relative_l2": l2 / reference_norm if reference_norm else (math.inf if l2 else 0.0),
        "psnr_db": 20 * math.log10(PEAK) - 10 * math.log10(mse) if mse else math.inf,
    }


def _cosine(product: float, first_norm: float, second_norm: float) -> float:
    if first_norm == 0 or second_norm == 0:
        return 1.0 if first_norm == second_norm else 0.0
    return max(-1.0, min(1.0, product / (first_norm * second_norm)))


def sequence_metrics(reference: Sequence[Image], candidate: Sequence[Image]) -> dict[str, Any]:
    """Metrics of the first frame, the middle frame and all frames together, under the names for frames and for images.

    A further list has the metrics of each image. None stands for infinity, which JSON does not have.

    Raises:
        RecipeError: there are no images, or their numbers or sizes differ.
    """
    if len(reference) != len(candidate):
        raise RecipeError(f"compare: found {len(candidate)} images for {len(reference)} of the reference")
    if not reference:
        raise RecipeError("compare: found no images to compare")
    middle = len(reference) // 2
    each = [_for_json(image_metrics(*pair)) for pair in zip(reference, candidate, strict=True)]
    first, mid = each[0], each[middle]
    everything = _for_json(image_metrics(_pixels(reference), _pixels(candidate)))
    return {"per_image_metrics": each} | {
        f"{key}{plural}{rest}": value
        for noun in ("frame", "image")
        for key, plural, rest, value in (
            ("num_", noun + "s", "", len(reference)),
            (noun, "0", "_metrics", first),
            ("mid_", noun, "_index", middle),
            ("mid_", noun, "_metrics", mid),
            ("all_", noun + "s", "_metrics", everything),
        )
    }


def trajectory_metrics(
    reference: Sequence[Sequence[Latents]], candidate: Sequence[Sequence[Latents]]
) -> dict[str, Any]:
    """The distance of latents after each denoising step, relative to the reference's; empty lists if none are known.

    None stands for a distance that is no number, which JSON does not have.

    Args:
        reference, candidate: for each prompt the latents after each step

    Raises:
        RecipeError: shapes differ.
    """
    each = [
        [_relative_distance(*pair) for pair in zip(first, second, strict=False)]
        for first, second in zip(reference, candidate, strict=True)
    ]
    steps = min((len(distances) for distances in each), default=0)
    means = [_mean([distances[step] for distances in each]) for step in range(steps)]
    return {"per_prompt_relative_l2_per_step": each, "mean_relative_l2_per_step": means}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _relative_distance(reference: Latents, candidate: Latents) -> float | None:
    if reference.shape != candidate.shape:
        raise RecipeError(f"compare: found latents of {candidate.shape} for {reference.shape} of the reference")
    norm = float(np.linalg.norm(reference.astype(np.float64)))
    distance = float(np.linalg.norm(candidate.astype(np.float64) - reference))
    if not math.isfinite(distance) or not math.isfinite(norm):
        return None
    return distance / norm if norm else 0.0


def _pixels(images: Sequence[Image]) -> Image:
    """All pixels in a row, since prompts with images of their own may give images of several sizes."""
    return np.concatenate([image.ravel() for image in images])


def summary_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that the terminal shows: of the first image, of all together, and of the worst of several.

    The PSNR of all together is that of their pooled error, so that equal images count too, whose own PSNR is null.
    """
    each = metrics["per_image_metrics"]
    summary = {f"image0_{name}": each[0][name] for name in SHOWN}
    if len(each) > 1:
        worst = max(range(len(each)), key=lambda index: float(each[index]["mse"]))
        summary["num_images"] = len(each)
        summary["worst_image_index"] = worst
        for name in SHOWN:
            summary[f"all_images_{name}"] = metrics["all_images_metrics"][name]
            summary[f"per_image_{name}"] = [image[name] for image in each]
            summary[f"worst_image_{name}"] = each[worst][name]
    return summary


def _for_json(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isinf(value) else value for name, value in metrics.items()}


def rmse(reference: Sequence[Image], candidate: Sequence[Image]) -> float:
    """Root mean square difference in grey levels over all pixels of all images."""
    return image_metrics(np.stack(reference), np.stack(candidate))["rmse"]
