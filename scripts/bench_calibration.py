"""What calibration on few or many prompts gains and costs, in PSNR of images against BF16, on one pipeline.

    python scripts/bench_calibration.py demo
    python scripts/bench_calibration.py tests/data/flux --prompts 1 2 4 8 40 --steps 4 8 20 --images 16

Statistics come from the calibration prompts, images from the evaluation prompts. A pipeline FOLDER has both beside it,
in FOLDER_prompts.txt and FOLDER_evaluation_prompts.txt. Each form is compared with one that must not be better:

    mxfp4, mxfp4_dualscale    the same method without calibration; `gptq` is calibrated too, and rounds by GPTQ
    fp8, nvfp4, static        static scales from 40 prompts at the pipeline's own steps

`bound` leaves weights in BF16 and rounds the inputs of layers: what no file changes, unless mul_scale does. A gain is
the mean over images of the difference in PSNR, with its standard error; with more images than prompts, each prompt has
several seeds. Every finished row is kept in rows.json of the output, so that an interrupted run continues; reference
images and statistics are computed once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from omni_convert.convert.calibration.generation import GenerationSettings, run_prompts
from omni_convert.convert.calibration.input_observer import candidate_layers
from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.prompts import Prompt, read_prompts
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.comparison.comparison import Variant, run_variant, settings_of
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import DEMO_EVALUATION_PROMPTS, DEMO_PIPELINE, DEMO_PROMPTS, resolve_source
from omni_convert.formats.arithmetic.input_values import quantize_mxfp4_dualscale_input, quantize_mxfp4_input
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.loaders.pipeline import load_pipeline

SEED = 42
SMOOTHED = {"mxfp4": quantize_mxfp4_input, "mxfp4_dualscale": quantize_mxfp4_dualscale_input}
STATIC = ("fp8", "nvfp4")
MOST_PROMPTS = 40
ALLOWED_DB = 0.15


@dataclass(frozen=True)
class Form:
    """A way to convert.

    Attributes:
        kind: plain (without statistics), calibrated, gptq, or bound
        prompts: number of calibration prompts; 0 without
        steps: denoising steps of calibration; 0 without
    """

    method: str
    kind: str
    prompts: int = 0
    steps: int = 0

    @property
    def key(self) -> str:
        return f"{self.method} {self.kind} {self.prompts} prompts {self.steps} steps"


def main() -> int:
    """Returns 1 if calibration makes something worse than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="`demo`, or a folder with prompts beside it")
    parser.add_argument("--output", type=Path, help="default: calibration-output/NAME")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 40], help="numbers of calibration prompts")
    parser.add_argument("--steps", type=int, nargs="+", help="steps of calibration; default: own, and 4 for 8 prompts")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=[*SMOOTHED, *STATIC], choices=[*SMOOTHED, *STATIC])
    parser.add_argument("--gptq", action="store_true", help="GPTQ too, with second moments of the same prompts")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers|transformers")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    bench = Bench.of(arguments.pipeline, arguments.output, arguments.images)
    counts = sorted(set(arguments.prompts))
    if arguments.steps:
        cells = [(count, steps) for steps in arguments.steps for count in counts]
    else:
        cells = [(count, bench.own_steps) for count in counts] + [(8, 4)]
    print(f"{bench.folder.name}: {arguments.images} images, own steps {bench.own_steps}")
    print(f"{'method':<16} {'kind':<10} {'prompts':>7} {'steps':>5} {'PSNR':>6} {'gain':>7} {'error':>6}")
    worse = [
        form.key
        for method in arguments.methods
        for form in forms(method, cells, bench.own_steps, with_gptq=arguments.gptq)
        if not bench.report(form, reference_form(method, bench.own_steps))
    ]
    if worse:
        print(f"worse than they may be: {'; '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


def reference_form(method: str, own_steps: int) -> Form:
    """The form that others of a method must not be worse than."""
    return Form(method, "calibrated", MOST_PROMPTS, own_steps) if method in STATIC else Form(method, "plain")


def forms(method: str, cells: Sequence[tuple[int, int]], own_steps: int, *, with_gptq: bool) -> Iterator[Form]:
    """All forms of a method, the one that others are compared with first."""
    first = reference_form(method, own_steps)
    yield first
    yield Form(method, "bound" if method in SMOOTHED else "plain")
    for kind in ("calibrated", "gptq") if with_gptq and method in SMOOTHED else ("calibrated",):
        for prompts, steps in cells:
            if (form := Form(method, kind, prompts, steps)) != first:
                yield form


@dataclass(frozen=True)
class Bench:
    """One pipeline, and what was measured on it."""

    folder: Path
    calibration: Sequence[Prompt]
    evaluation: Sequence[Prompt]
    output: Path

    @classmethod
    def of(cls, name: str, output: Path | None, images: int) -> Bench:
        """The bench of a pipeline; its evaluation prompts are repeated until there are `images` of them."""
        folder, prompts, evaluation = DEMO_PIPELINE, DEMO_PROMPTS, DEMO_EVALUATION_PROMPTS
        if name != "demo":
            folder = Path(name)
            prompts, evaluation = (
                folder.with_name(f"{folder.name}_{kind}.txt") for kind in ("prompts", "evaluation_prompts")
            )
        output = output or Path("calibration-output") / ("demo" if name == "demo" else folder.name)
        output.mkdir(parents=True, exist_ok=True)
        found = read_prompts(evaluation)
        return cls(folder, read_prompts(prompts), [found[index % len(found)] for index in range(images)], output)

    @cached_property
    def own_steps(self) -> int:
        steps = GenerationSettings.for_pipeline(self.folder).steps
        assert steps is not None, "a pipeline to judge on says how many steps it takes"
        return steps

    @cached_property
    def reference(self) -> np.ndarray[Any, Any]:
        """The images of the BF16 pipeline, uint8 [images, frames, height, width, 3]."""
        path = self.output / f"reference-{len(self.evaluation)}.npy"
        if not path.exists():
            np.save(path, self._images(self.folder))
        return np.load(path)  # type: ignore[no-any-return]  # numpy's

    @cached_property
    def settings(self) -> GenerationSettings:
        return settings_of(Variant("reference", str(self.folder)), {})

    def report(self, form: Form, base: Form) -> bool:
        """Prints a row; returns whether the form is as good as it must be."""
        errors, others = self._errors(form), self._errors(base)
        gains = [psnr(error) - psnr(other) for error, other in zip(errors, others, strict=True)]
        gain, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
        print(
            f"{form.method:<16} {form.kind:<10} {form.prompts or '':>7} {form.steps or '':>5} "
            f"{psnr(statistics.fmean(errors)):>6.2f} {gain:>+7.2f} {error:>6.2f}",
            flush=True,
        )
        return form.kind in ("plain", "bound") or gain >= -ALLOWED_DB - error

    def _errors(self, form: Form) -> list[float]:
        """Mean squared error of each image, measured or read."""
        path = self.output / "rows.json"
        rows: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
        key = f"{form.key}, {len(self.evaluation)} images"
        if key not in rows:
            images = self._bound_images(form.method) if form.kind == "bound" else self._images(self._converted(form))
            difference = images.astype(np.float64) - self.reference
            rows[key] = np.square(difference).mean(axis=tuple(range(1, difference.ndim))).tolist()
            path.write_text(json.dumps(rows, indent=1) + "\n")
        return rows[key]

    def _images(self, folder: Path) -> np.ndarray[Any, Any]:
        run = run_variant(Variant("candidate", str(folder)), self.evaluation, self.settings, SEED)
        return np.stack([np.stack(output) for output in run.outputs])

    def _bound_images(self, method: str) -> np.ndarray[Any, Any]:
        """Images with weights in BF16 and the inputs of layers rounded as a method's runtime does."""
        pipe = load_pipeline(self.folder, "cpu")
        for model in (pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None):
            for stem in candidate_layers(model):
                model.get_submodule(stem).register_forward_pre_hook(_rounding_hook(method))
        runs = [(prompt, SEED + place) for place, prompt in enumerate(self.evaluation)]
        outputs = run_prompts(pipe, runs, self.settings.completed(pipe))
        return np.stack([np.stack([np.asarray(frame.convert("RGB")) for frame in output]) for output in outputs])

    def _converted(self, form: Form) -> Path:
        """The folder of the pipeline in some form, overwritten by the next."""
        folder = self.output / "converted"
        known = () if form.prompts == 0 else (self._statistics(form.prompts, form.steps),)
        moments = (self._moments(form.prompts, form.steps),) if form.kind == "gptq" else ()
        recipe = Recipe(form.method, calibration=known, moments=moments, runtime="diffusers", overwrite=True)
        convert_checkpoint(str(self.folder), folder, recipe)
        return folder

    def _statistics(self, prompts: int, steps: int) -> Path:
        """The statistics of the first prompts, which contain those of fewer prompts."""
        return self._recorded(prompts, steps)[0]

    def _moments(self, prompts: int, steps: int) -> Path:
        return self._recorded(prompts, steps)[1]

    def _recorded(self, prompts: int, steps: int) -> tuple[Path, Path]:
        """The files of statistics and second moments of the first prompts; made of those of fewer, and the others."""
        names = ("statistics", "moments")
        found, moments = (self.output / f"{name}-{prompts}-{steps}.safetensors" for name in names)
        if moments.exists():
            return found, moments
        fewer = max((count for count in (1, 2, 4, 8) if count < prompts), default=0)
        texts = self.output / "prompts.txt"
        texts.write_text("\n".join(prompt.text for prompt in self.calibration[fewer:prompts]) + "\n")
        recipe = Recipe(calib=texts, calib_steps=steps)
        new = record_source(resolve_source(str(self.folder)), recipe, with_moments=True, progress=False)
        assert new.moments is not None, "they were asked for"
        earlier = self._recorded(fewer, steps) if fewer else None
        both = new.statistics if earlier is None else Statistics.load(earlier[0]).merge([new.statistics])
        sums = new.moments if earlier is None else Moments.load(earlier[1]).merge([new.moments])
        both.save(found)
        sums.save(moments)
        return found, moments


def _rounding_hook(method: str) -> Any:
    def rounded(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (SMOOTHED[method](args[0]).to(args[0].dtype), *args[1:])

    return rounded


def psnr(mean_square: float) -> float:
    """In dB; equal images count as half a grey level of error in a single value of a thousand."""
    return 10 * math.log10(255**2 / max(mean_square, 0.25e-3))


if __name__ == "__main__":
    sys.exit(main())
