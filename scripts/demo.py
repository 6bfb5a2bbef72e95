"""The main job, end to end, on the bundled pipeline: calibrate, convert four ways, load each, compare each with BF16.

Prints a table and writes a picture. Exits with 1 when a method misses what serving engines ask of a quantized pipeline
(PSNR >= 25 dB, MAE <= 6, cosine >= 0.995, relative L2 <= 0.08) or a noise ratio of 2.

The noise ratio is the RMSE against the BF16 images over the RMSE between the BF16 and the FP32 run of the same
pipeline, pooled over all pixels: how much quantizing changes a picture, in units of what BF16 itself changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from omni_convert.convert.calibration import calibrate_source
from omni_convert.convert.comparison import Run, Variant, run_variant, settings_of
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.metrics import rmse, sequence_metrics
from omni_convert.convert.picture import comparison_picture
from omni_convert.convert.prompts import read_prompts
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source import DEMO_EVALUATION_PROMPTS, DEMO_PIPELINE, DEMO_PROMPTS, resolve_source

STRICT = {
    "psnr_db": (25.0, "min"),
    "mae": (6.0, "max"),
    "cosine_similarity": (0.995, "min"),
    "relative_l2": (0.08, "max"),
}
NOISE_RATIO_MAX = 2.0
SEED = 42


def recipes(statistics: Path) -> dict[str, Recipe]:
    return {
        "fp8 static": Recipe(method="fp8", calibration=(statistics,), overwrite=True),
        "fp8 dynamic": Recipe(method="fp8", overwrite=True),
        "fp8 block 128x128": Recipe(method="fp8", weight_block_size=(128, 128), overwrite=True),
        "int8": Recipe(method="int8", overwrite=True),
    }


def meets_the_bar(metrics: dict[str, float]) -> bool:
    """Whether every metric is on the right side of its threshold."""
    good = all(
        metrics[name] >= bound if side == "min" else metrics[name] <= bound for name, (bound, side) in STRICT.items()
    )
    return good and metrics["noise_ratio"] <= NOISE_RATIO_MAX


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--prompts", type=int, default=8, help="evaluation prompts to use")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers|transformers")
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    print(f"calibrating on {DEMO_PROMPTS.name}")
    statistics = output / "stats.safetensors"
    calibrate_source(resolve_source(None), Recipe(calib=DEMO_PROMPTS)).save(statistics)

    folders: dict[str, Path] = {}
    for name, recipe in recipes(statistics).items():
        folders[name] = output / name.replace(" ", "-")
        report = convert_checkpoint(None, folders[name], recipe)
        print(
            f"converted   {name:<18} {len(report.layers)} layers, {report.bytes_before / 1e6:.1f} → "
            f"{report.bytes_after / 1e6:.1f} MB in {report.seconds:.1f} s"
        )

    prompts = read_prompts(DEMO_EVALUATION_PROMPTS)[: arguments.prompts]
    base = Variant("reference", str(DEMO_PIPELINE))
    settings = settings_of(base, {})
    reference = run_variant(base, prompts, settings, SEED)
    exact = run_variant(Variant("fp32", base.model, dtype=torch.float32), prompts, settings, SEED)
    noise = rmse(exact.images, reference.images)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, float]] = {}
    for name, folder in folders.items():
        runs[name] = run_variant(Variant(name, str(folder)), prompts, settings, SEED)
        metrics = sequence_metrics(reference.images, runs[name].images)["all_images_metrics"]
        rows[name] = metrics | {"noise_ratio": metrics["rmse"] / noise}

    print(
        f"\n{len(prompts)} evaluation prompts, seed {SEED}, {settings.steps} steps; BF16 against FP32: RMSE {noise:.3f}"
    )
    print(f"{'method':<18} {'PSNR':>6} {'MAE':>6} {'cosine':>8} {'rel L2':>7} {'noise x':>8} {'MB':>6}  kernels")
    for name, metrics in rows.items():
        size = sum(file.stat().st_size for file in (folders[name] / "transformer").glob("*.safetensors")) / 1e6
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in runs[name].kernels.items())
        print(
            f"{name:<18} {metrics['psnr_db']:>6.1f} {metrics['mae']:>6.2f} {metrics['cosine_similarity']:>8.5f} "
            f"{metrics['relative_l2']:>7.4f} {metrics['noise_ratio']:>8.2f} {size:>6.1f}  {kernels}"
        )
    picture = output / "comparison.png"
    comparison_picture(reference.images, {name: run.images for name, run in runs.items()}, scale=2).save(picture)
    (output / "demo.json").write_text(json.dumps(rows, indent=2) + "\n")
    failed = [name for name, metrics in rows.items() if not meets_the_bar(metrics)]
    print(f"\n{picture}, {time.monotonic() - started:.0f} s in all")
    if failed:
        print(f"missed the bar: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
