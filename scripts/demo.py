"""The main job, end to end, on the bundled pipeline: calibrate, convert, load, and compare with BF16.

Prints a table and writes a picture. Exits with 1 when an 8-bit method misses what serving engines ask of a quantized
pipeline (PSNR >= 25 dB, MAE <= 6, cosine >= 0.995, relative L2 <= 0.08), when a method misses its noise ratio, or when
all that lowers the error of dual-scale MXFP4 gains less than 2 dB PSNR over plain rounding.

`--formats` takes the formats that ComfyUI, GGUF's readers, AutoRound and bitsandbytes have. With `--pipeline` all of it
is done to another pipeline, and only the table counts.

The noise ratio is the RMSE against the BF16 images over the RMSE between the BF16 and the FP32 run of the same
pipeline, pooled over all pixels: how much quantizing changes a picture, in units of what BF16 itself changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from omni_convert.convert.calibration.prompts import Prompt, read_prompts
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.comparison.comparison import Run, Variant, run_variant, settings_of
from omni_convert.convert.comparison.grid import comparison_image
from omni_convert.convert.comparison.metrics import Image, image_metrics, rmse
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import DEMO_EVALUATION_PROMPTS, DEMO_PIPELINE, DEMO_PROMPTS, resolve_source

STRICT = {
    "psnr_db": (25.0, "min"),
    "mae": (6.0, "max"),
    "cosine_similarity": (0.995, "min"),
    "relative_l2": (0.08, "max"),
}
GAIN_DB = 2.0
SEED = 42
PROMPTS_SHOWN = 8


@dataclass(frozen=True)
class Case:
    """A way to convert, and what must come of it.

    Attributes:
        name: in the table
        recipe: how to convert
        noise_ratio: must not be exceeded
        is_strict: the bounds of serving engines hold
        improves: the case whose PSNR it must beat, by `GAIN_DB`
    """

    name: str
    recipe: Recipe
    noise_ratio: float = float("inf")
    is_strict: bool = False
    improves: str | None = None

    def passes(self, rows: dict[str, dict[str, float]]) -> bool:
        """Whether every metric is on the right side of its bound; `rows` has the metrics of all cases."""
        metrics = rows[self.name]
        good = all(
            metrics[name] >= bound if side == "min" else metrics[name] <= bound
            for name, (bound, side) in STRICT.items()
        )
        least = rows[self.improves]["psnr_db"] + GAIN_DB if self.improves else 0.0
        return (
            (good or not self.is_strict) and metrics["noise_ratio"] <= self.noise_ratio and metrics["psnr_db"] >= least
        )


def cases(statistics: Path) -> list[Case]:
    """The conversions of the demo."""
    known = (statistics,)
    return [
        Case("fp8 static", Recipe("fp8", calibration=known), 2.0, True),
        Case("fp8 dynamic", Recipe("fp8"), 2.0, True),
        Case("fp8 block 128x128", Recipe("fp8", weight_block_size=(128, 128)), 2.0, True),
        Case("int8", Recipe("int8"), 2.0, True),
    ]


def microscaling_cases(statistics: Path, moments: Path) -> list[Case]:
    """For each microscaling method, one more step at a time that lowers its error."""
    known = (statistics,)
    others = [
        Case("mxfp8 plain", Recipe("mxfp8", scale_rule="floor", search=False), is_strict=True),
        Case("mxfp8 searched", Recipe("mxfp8"), is_strict=True),
        Case("mxfp8 gptq", Recipe("mxfp8", calibration=known, rounding="auto"), 2.0, True),
        Case("mxfp8 gptq, moments", Recipe("mxfp8", calibration=known, moments=(moments,)), 2.0, True),
        Case("nvfp4", Recipe("nvfp4", calibration=known, rounding="nearest")),
        Case("nvfp4 gptq", Recipe("nvfp4", calibration=known)),
        Case("nvfp4 gptq, moments", Recipe("nvfp4", calibration=known, moments=(moments,))),
    ]
    for method, improves in (("mxfp4", None), ("mxfp4_dualscale", "mxfp4_dualscale plain")):
        others += [
            Case(f"{method} plain", Recipe(method, scale_rule="floor", search=False)),
            Case(f"{method} searched", Recipe(method)),
            Case(f"{method} smoothed", Recipe(method, calibration=known, rounding="nearest")),
            Case(f"{method} gptq", Recipe(method, calibration=known), improves=improves),
            Case(f"{method} gptq, moments", Recipe(method, calibration=known, moments=(moments,)), improves=improves),
        ]
    return others


def format_cases(statistics: Path, moments: Path) -> list[Case]:
    """The formats of ComfyUI, GGUF, AutoRound and bitsandbytes."""
    known = (statistics,)
    kinds = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL")
    mixtures = ("Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S")
    others = [
        Case("int8 per row", Recipe("int8", dialect="comfyui")),
        Case("int8 rotated", Recipe("int8", dialect="comfyui", rotate=True)),
        *(Case(method, Recipe(method)) for method in ("w6a8", "w4a8", "convrot_w4a4", "nf4", "w4a16")),
        Case("nf4 nested", Recipe("nf4", double_quant=True)),
        *(Case(f"{method} gptq", Recipe(method, calibration=known)) for method in ("nf4", "w4a16")),
        *(Case(f"{method} auto-round", Recipe(method, dialect="auto-round")) for method in ("mxfp8", "mxfp4")),
        Case("nvfp4 auto-round", Recipe("nvfp4", dialect="auto-round", calibration=known)),
        *(Case(f"gguf {kind}", Recipe("gguf", gguf_type=kind)) for kind in kinds),
    ]
    for kind in (*kinds[1:], *mixtures):
        weighted = Recipe("gguf", gguf_type=kind, calibration=known, rounding="nearest")
        others += [
            Case(f"gguf {kind} importance", weighted),
            Case(f"gguf {kind} gptq", replace(weighted, rounding=None)),
        ]
    for kind in ("Q4_K", "Q3_K"):
        recipe = Recipe("gguf", gguf_type=kind, calibration=known, moments=(moments,))
        others.append(Case(f"gguf {kind} gptq, moments", recipe))
    return others


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--prompts", type=int, help="evaluation prompts to use; default: all 16")
    parser.add_argument("--all", action="store_true", help="the microscaling methods too: twice as long")
    parser.add_argument("--formats", action="store_true", help="the formats of other tools, in place of the methods")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these rows of the table")
    parser.add_argument("--pipeline", type=Path, help="another pipeline than the bundled one")
    parser.add_argument("--calib", type=Path, default=DEMO_PROMPTS, help="prompts for calibration")
    parser.add_argument("--evaluation", type=Path, default=DEMO_EVALUATION_PROMPTS, help="evaluation prompts")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers|transformers")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    statistics, moments = output / "stats.safetensors", output / "moments.safetensors"
    chosen = format_cases(statistics, moments) if arguments.formats else cases(statistics)
    chosen += microscaling_cases(statistics, moments) if arguments.all else []
    chosen = [case for case in chosen if not arguments.only or case.name in arguments.only]
    calibrate(arguments, statistics, moments, chosen)
    folders = [convert(case, arguments.pipeline, output) for case in chosen]
    prompts = read_prompts(arguments.evaluation)[: arguments.prompts]
    failed = compare_with_bf16(chosen, folders, arguments.pipeline or DEMO_PIPELINE, prompts, output)
    print(f"{output / 'comparison.png'}, {time.monotonic() - started:.0f} s in all")
    if failed and arguments.pipeline is None:
        print(f"missed the bar: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


def calibrate(arguments: argparse.Namespace, statistics: Path, moments: Path, chosen: Sequence[Case]) -> None:
    """Records what the cases use, unless files of an earlier run have it."""
    with_moments = any(case.recipe.moments for case in chosen)
    if not any(case.recipe.is_calibrated for case in chosen):
        return
    if statistics.is_file() and (moments.is_file() or not with_moments):
        print(f"taking {statistics}")
        return
    print(f"calibrating on {arguments.calib.name}")
    source = resolve_source(None if arguments.pipeline is None else str(arguments.pipeline))
    recording = record_source(source, Recipe(calib=arguments.calib), with_moments=with_moments)
    recording.statistics.save(statistics)
    if recording.moments is not None:
        recording.moments.save(moments)


def convert(case: Case, pipeline: Path | None, output: Path) -> Path:
    """Converts the pipeline, by default the demo, as a case says, into a folder of its name."""
    folder = output / case.name.replace(" ", "-")
    report = convert_checkpoint(pipeline, folder, replace(case.recipe, overwrite=True))
    print(
        f"converted   {case.name:<24} {len(report.layers)} layers, {report.bytes_before / 1e6:.1f} → "
        f"{report.bytes_after / 1e6:.1f} MB in {report.seconds:.1f} s"
    )
    return folder


def compare_with_bf16(
    chosen: Sequence[Case], folders: Sequence[Path], pipeline: Path, prompts: Sequence[Prompt], output: Path
) -> list[str]:
    """Runs every case over the prompts, prints the table, writes the picture; returns the names of those that fail."""
    base = Variant("reference", str(pipeline))
    settings = settings_of(base, {})
    reference = run_variant(base, prompts, settings, SEED)
    exact = run_variant(Variant("fp32", base.model, dtype=torch.float32), prompts, settings, SEED)
    noise = rmse(exact.images, reference.images)
    print(f"\n{len(prompts)} evaluation prompts, seed {SEED}, {settings.steps} steps; BF16 to FP32: RMSE {noise:.3f}")
    print(f"{'method':<24} {'PSNR':>6} {'MAE':>6} {'cosine':>8} {'rel L2':>7} {'noise x':>8} {'MB':>6}  kernels")
    shown: dict[str, list[Image]] = {}
    rows: dict[str, dict[str, float]] = {}
    for case, folder in zip(chosen, folders, strict=True):
        run = run_variant(Variant(case.name, str(folder)), prompts, settings, SEED)
        metrics = image_metrics(np.stack(reference.images), np.stack(run.images))
        rows[case.name] = metrics | {"noise_ratio": metrics["rmse"] / noise}
        shown[case.name] = run.images[:PROMPTS_SHOWN]
        print_row(case.name, rows[case.name], folder, run)
    comparison_image(reference.images[:PROMPTS_SHOWN], shown, scale=2).save(output / "comparison.png")
    (output / "demo.json").write_text(json.dumps(rows, indent=2) + "\n")
    return [case.name for case in chosen if not case.passes(rows)]


def print_row(name: str, metrics: dict[str, float], folder: Path, run: Run) -> None:
    """One line of the table."""
    files = (folder / "transformer").iterdir()
    size = sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".gguf")) / 1e6
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in run.kernels.items())
    print(
        f"{name:<24} {metrics['psnr_db']:>6.1f} {metrics['mae']:>6.2f} {metrics['cosine_similarity']:>8.5f} "
        f"{metrics['relative_l2']:>7.4f} {metrics['noise_ratio']:>8.2f} {size:>6.1f}  {kernels}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
