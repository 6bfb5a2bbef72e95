r"""Noise of SVDQuant beside other formats of four bits whose inputs are rounded to four bits too.

    python scripts/train_development_pipelines.py flux --output tests/data/flux
    python scripts/bench_four_bits.py tests/data/flux --calib tests/data/flux_prompts.txt \
      --evaluation tests/data/flux_evaluation_prompts.txt

The layers of the pipeline must be multiples of 128 wide; all of its blocks are quantized. Statistics and second moments
come from the calibration prompts, and are kept in the output folder; images come from the evaluation prompts. The noise
ratio is that of `scripts/demo.py`. W4A16 has the groups of `svdquant_int4`, and its inputs are rounded alike.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from omni_convert.convert.calibration.generation import run_pipeline
from omni_convert.convert.calibration.prompts import read_prompts
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.comparison.comparison import Variant, run_variant, settings_of
from omni_convert.convert.comparison.metrics import rmse
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.schemes.svdquant import INT4_GROUP, SvdQuantInt4
from omni_convert.loaders import load_pipeline
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear

SEED = 42


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True, help="calibration prompts")
    parser.add_argument("--evaluation", type=Path, required=True, help="evaluation prompts")
    parser.add_argument("--prompts", type=int, default=8, help="evaluation prompts that are run")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("four-bits-output"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers|transformers")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    known, moments = (options.output / f"{name}.safetensors" for name in ("statistics", "moments"))
    if not (known.exists() and moments.exists()):
        recording = record_source(resolve_source(options.model), Recipe(calib=options.calib), with_moments=True)
        recording.statistics.save(known)
        assert recording.moments is not None, "they were asked for"
        recording.moments.save(moments)
    measure(options, recipes(known, moments))
    return 0


def measure(options: argparse.Namespace, cases: dict[str, Recipe]) -> None:
    """Prints a line for each case: layers, bytes of the transformer, seconds per layer and noise ratio."""
    prompts = read_prompts(options.evaluation)[: options.prompts]
    base = Variant("reference", str(options.model))
    settings = settings_of(base, {})
    reference = run_variant(base, prompts, settings, SEED)
    exact = run_variant(Variant("fp32", base.model, dtype=torch.float32), prompts, settings, SEED)
    noise = rmse(exact.images, reference.images)
    print(f"{len(prompts)} prompts; BF16 to FP32: RMSE {noise:.3f}")
    print(f"{'case':<34}{'layers':>7}{'MB':>7}{'s/layer':>9}{'noise':>10}", flush=True)
    for name, recipe in cases.items():
        if options.cases not in name:
            continue
        folder = options.output / name.replace(" ", "-")
        report = convert_checkpoint(options.model, folder, replace(recipe, overwrite=True, force=True))
        size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        pipe = load_pipeline(folder, "cpu", torch.bfloat16)
        if recipe.method == "w4a16":
            round_inputs_to_int4(pipe.transformer)
        runs = run_pipeline(pipe, prompts, settings.completed(pipe), SEED)
        images = [np.asarray(frame.convert("RGB")) for frames in runs for frame in frames]
        measured, seconds = rmse(reference.images, images) / noise, report.seconds / len(report.layers)
        print(f"{name:<34}{len(report.layers):>7}{size / 1e6:>7.2f}{seconds:>9.3f}{measured:>10.2f}", flush=True)


def recipes(known: Path, moments: Path) -> dict[str, Recipe]:
    """The formats to compare: integers in groups of 64 columns, NVFP4, and SVDQuant in both."""
    common: dict[str, Any] = {"calibration": (known,), "runtime": "diffusers", "rounding": "nearest"}
    gptq: dict[str, Any] = {**common, "moments": (moments,), "rounding": "gptq"}
    lite = "nunchaku-lite"
    return {
        "w4a16 gptq, int4 inputs": Recipe("w4a16", group_size=INT4_GROUP, **gptq),
        "svdquant_int4": Recipe("svdquant_int4", dialect=lite, **common),
        "svdquant_int4 gptq": Recipe("svdquant_int4", dialect=lite, **gptq),
        "nvfp4 gptq": Recipe("nvfp4", **gptq),
        "svdquant_nvfp4": Recipe("svdquant_nvfp4", dialect=lite, **common),
        "svdquant_nvfp4 gptq": Recipe("svdquant_nvfp4", dialect=lite, **gptq),
    }


def round_inputs_to_int4(model: nn.Module) -> None:
    """Rounds what quantized layers get as `svdquant_int4` does: per token and 64 columns."""

    def rounded_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (SvdQuantInt4().round_inputs(inputs[0], {}).to(inputs[0].dtype), *inputs[1:])

    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.register_forward_pre_hook(rounded_inputs)


if __name__ == "__main__":
    sys.exit(main())
