"""Text to image with a quantized pipeline, with the options that serving engines have.

    python scripts/text_to_image.py --quantization fp8 --prompt "a large red circle in the center on a blue background"

Without a model it runs the bundled demo pipeline, which draws shapes. It prints which kernel runs each layer, the time
that a step takes, and how often a cache was used.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni_convert.convert.calibration.frames import check_frames_path, write_frames
from omni_convert.convert.calibration.generation import GenerationSettings, has_step_callback, run_pipeline
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.source.location import DEMO_PIPELINE
from omni_convert.formats.errors import OmniConvertError, RecipeError
from omni_convert.loaders import enable_fp8_attention, enable_step_cache, kernel_report, load_pipeline
from omni_convert.loaders.step_cache import BACKENDS, step_cache_of

# The default prompt of serving engines' scripts.
PROMPT = "a cup of coffee on the table"
VIDEO_FPS = 24
#: Backend of a cache → its setting that `--cache-threshold` gives.
THRESHOLDS = {"tea_cache": "rel_l1_thresh", "first_block_cache": "threshold", "cache_dit": "residual_diff_threshold"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1, with one line on standard error, for what the user can put right."""
    options = build_parser().parse_args(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        generate(options)
    except OmniConvertError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_PIPELINE), help="folder or Hub repository; default: the demo")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    parser.add_argument("--quantization", metavar="METHOD", help="quantize while loading; not for quantized models")
    parser.add_argument(
        "--ignored-layers", metavar="PATTERNS", help="separated by commas, or a JSON list: layers to leave as they are"
    )
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--cache-backend",
        choices=list(BACKENDS),
        help="skip blocks whose outcome changes little from step to step",
    )
    parser.add_argument(
        "--cache-config", metavar="JSON", help="""settings of the cache, as '{"rel_l1_thresh": 0.2}' of tea_cache"""
    )
    parser.add_argument("--cache-threshold", type=float, help="short for the setting that says which change is little")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="accepted as 1")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "float", "fp8"],
        default="auto",
        help="fp8: quantize Q, K and V of the attention; auto and float leave it as it is",
    )
    parser.add_argument(
        "--kv-cache-skip-layers", metavar="BLOCKS", help="of fp8: blocks to leave as they are, as 0-9,20,25-30"
    )
    parser.add_argument("--kv-cache-skip-steps", metavar="STEPS", help="of fp8: denoising steps, likewise")
    parser.add_argument(
        "--fp8-attention-backend",
        metavar="NAME",
        help="of fp8: flash_3, sage, flash_3_hub or reference; default: the first that is installed and runs here",
    )
    parser.add_argument("--vae-use-tiling", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("output.png"))
    return parser


def generate(options: argparse.Namespace) -> None:
    """Loads, runs and saves.

    Raises:
        OmniConvertError: the model, the prompt and the options do not fit.
    """
    if options.tensor_parallel_size != 1:
        raise RecipeError(
            f"--tensor-parallel-size: found {options.tensor_parallel_size}, but diffusers splits no quantized layers; "
            "use 1, or serve the model with vLLM-Omni"
        )
    check_frames_path(options.output)
    started = time.monotonic()
    pipe = load_pipeline(options.model, options.device, quantization=quantization_of(options))
    print(f"loaded in {time.monotonic() - started:.1f} s")
    quantize_attention(pipe, options)
    print(kernel_report(pipe))
    if options.vae_use_tiling:
        pipe.vae.enable_tiling()
    use_cache(pipe, options)
    settings = GenerationSettings.for_pipeline(
        Path(options.model),
        {
            "steps": options.num_inference_steps,
            "height": options.height,
            "width": options.width,
            "guidance_scale": options.guidance_scale,
        },
    )
    settings = settings.completed(pipe)
    times = [time.monotonic()]
    on_step = (lambda _step: times.append(time.monotonic())) if has_step_callback(pipe) else None
    frames = run_pipeline(pipe, [Prompt(options.prompt)], settings, options.seed, on_step=on_step)[0]
    took = time.monotonic() - times[0]
    steps = len(times) - 1
    a_step = f", {(times[-1] - times[1]) / (steps - 1) * 1000:.0f} ms a step after the first" if steps > 1 else ""
    print(f"generated in {took:.1f} s{a_step}")
    if options.cache_backend == "tea_cache":
        cache = step_cache_of(pipe)
        print(
            f"tea_cache: {cache.reused} of {cache.computed + cache.reused} calls of the transformer reused its blocks"
        )
    print(*write_frames(frames, options.output, VIDEO_FPS))


def quantization_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """The argument `quantization` of `load_pipeline`.

    Raises:
        RecipeError: layers to ignore, but no method.
    """
    if options.quantization is None:
        if options.ignored_layers:
            raise RecipeError("--ignored-layers: found no --quantization, expected one; a quantized model has its own")
        return None
    return {"method": options.quantization, "ignored_layers": patterns(options.ignored_layers or "")}


def quantize_attention(pipe: Any, options: argparse.Namespace) -> None:
    """Raises OmniConvertError where no kernel runs it, or where options of it are given without it."""
    if options.kv_cache_dtype == "fp8":
        enable_fp8_attention(
            pipe,
            backend=options.fp8_attention_backend,
            skip_layers=options.kv_cache_skip_layers,
            skip_steps=options.kv_cache_skip_steps,
        )
    elif options.fp8_attention_backend or options.kv_cache_skip_layers or options.kv_cache_skip_steps:
        raise RecipeError(f"--kv-cache-dtype: found {options.kv_cache_dtype} with options of fp8, expected fp8")


def patterns(text: str) -> list[str]:
    """The names in `a,b`, or in the JSON list `["a", "b"]`.

    Raises:
        RecipeError: the JSON is damaged.
    """
    if not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return [str(pattern) for pattern in json.loads(text)]
    except json.JSONDecodeError as error:
        raise RecipeError(f"--ignored-layers: found {text!r}, expected names or a JSON list ({error})") from None


def use_cache(pipe: Any, options: argparse.Namespace) -> None:
    """Skips blocks from step to step, if the options say so.

    Raises:
        RecipeError: the cache does not fit the pipeline, or its settings are damaged or lack a backend.
    """
    backend, settings = options.cache_backend, {}
    if options.cache_config is not None:
        try:
            settings = dict(json.loads(options.cache_config))
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"--cache-config: found {options.cache_config!r}, expected a JSON object ({error})"
            ) from None
    if backend is None:
        if settings or options.cache_threshold is not None:
            raise RecipeError("--cache-backend: found settings of a cache without it, expected one")
        return
    if options.cache_threshold is not None:
        settings[THRESHOLDS[backend]] = options.cache_threshold
    enable_step_cache(pipe, backend, settings)


if __name__ == "__main__":
    sys.exit(main())
