"""What calibration on few or many prompts gains and costs, in PSNR of images against BF16, on one pipeline.

    python scripts/bench_calibration.py demo
    python scripts/bench_calibration.py tests/data/flux --prompts 1 2 4 8 40 --steps 4 8 20 --images 16

Statistics come from the calibration prompts, images from the evaluation prompts. A pipeline FOLDER has both beside it,
in FOLDER_prompts.txt and FOLDER_evaluation_prompts.txt. Each form is compared with one that must not be better:

    mxfp4, mxfp4_dualscale    the same method without calibration
    fp8, nvfp4, static        static scales from 40 prompts at the pipeline's own steps, weights rounded to nearest

`nearest` rounds the weights of a calibrated method so, and `moments` gives GPTQ second moments of the same prompts.

Images of a small model tell little: one edge that moves costs several dB. So the denoiser is also called with the
inputs that it has in the BF16 run, at every step of the first prompts, and the error of its outputs is compared. The
last two columns say by how many dB it falls, with a standard error that is several times smaller.

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
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from omni_convert.convert.calibration.generation import GenerationSettings, run_prompts
from omni_convert.convert.calibration.input_observer import candidate_layers
from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.prompts import Prompt, read_prompts
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.comparison.comparison import Variant, settings_of
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
#: Ways to use statistics: by default, without GPTQ, and with second moments beside them.
KINDS = ("calibrated", "nearest", "moments")
MOST_PROMPTS = 40
ALLOWED_DB = 0.15
TRACED_PROMPTS = 4
#: Mean square of an image that equals the reference, so that decibels are finite.
LEAST_ERROR = 0.25e-3


@dataclass(frozen=True)
class Form:
    """A way to convert.

    Attributes:
        kind: plain (without statistics), one of `KINDS`, or bound
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
    parser.add_argument("--kinds", nargs="+", default=KINDS[:1], choices=KINDS, help="ways to use statistics")
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
    names = ("PSNR", "gain", "error", "of steps", "error")
    print(f"{'method':<16} {'kind':<10} {'prompts':>7} {'steps':>5}" + "".join(f" {name:>8}" for name in names))
    worse = [
        form.key
        for method in arguments.methods
        for form in forms(method, cells, bench.own_steps, arguments.kinds)
        if not bench.report(form, reference_form(method, bench.own_steps))
    ]
    if worse:
        print(f"worse than they may be: {'; '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


def reference_form(method: str, own_steps: int) -> Form:
    """The form that others of a method must not be worse than."""
    return Form(method, "nearest", MOST_PROMPTS, own_steps) if method in STATIC else Form(method, "plain")


def forms(method: str, cells: Sequence[tuple[int, int]], own_steps: int, kinds: Sequence[str]) -> Iterator[Form]:
    """All forms of a method, the one that others are compared with first."""
    first = reference_form(method, own_steps)
    yield first
    yield Form(method, "bound" if method in SMOOTHED else "plain")
    for kind in kinds if method in SMOOTHED else KINDS[:1]:
        for prompts, steps in cells:
            if (form := Form(method, kind, prompts, steps)) != first:
                yield form


@dataclass(frozen=True)
class Call:
    """A call of a denoiser in the BF16 run of a prompt.

    Attributes:
        prompt: its number
        model: name of the component
        output: float32 [values]
    """

    prompt: int
    model: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


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
    def settings(self) -> GenerationSettings:
        return settings_of(Variant("reference", str(self.folder)), {})

    @cached_property
    def reference(self) -> np.ndarray[Any, Any]:
        """The images of the BF16 pipeline, uint8 [images, frames, height, width, 3]."""
        path = self.output / f"reference-{len(self.evaluation)}.npy"
        if not path.exists():
            np.save(path, self._images(load_pipeline(self.folder, "cpu")))
        return np.load(path)  # type: ignore[no-any-return]  # numpy's

    @cached_property
    def calls(self) -> list[Call]:
        """What the denoisers get and give in the BF16 run of the first prompts."""
        pipe = load_pipeline(self.folder, "cpu")
        found: list[Call] = []
        for number, prompt in enumerate(self.evaluation[:TRACED_PROMPTS]):
            with ExitStack() as hooks:
                for name, model in denoisers(pipe).items():
                    hook = partial(_keep_call, found, number, name)
                    hooks.callback(model.register_forward_hook(hook, with_kwargs=True).remove)
                run_prompts(pipe, [(prompt, SEED + number)], self.settings.completed(pipe), decode=False)
        return found

    def report(self, form: Form, base: Form) -> bool:
        """Prints a row; returns whether the form is as good as it must be."""
        row, other = self._row(form), self._row(base)
        gain, error = paired_gain(other["images"], row["images"])
        step, step_error = paired_gain(other["steps"], row["steps"])
        quality = decibels(255**2 / statistics.fmean(row["images"]))
        print(
            f"{form.method:<16} {form.kind:<10} {form.prompts or '':>7} {form.steps or '':>5} {quality:>8.2f} "
            f"{gain:>+8.2f} {error:>8.2f} {step:>+8.2f} {step_error:>8.2f}",
            flush=True,
        )
        return form.kind in ("plain", "bound") or gain >= -ALLOWED_DB - error

    def _row(self, form: Form) -> dict[str, list[float]]:
        """Errors of a form, measured or read: mean square of each image, relative square of each prompt's steps."""
        path = self.output / "rows.json"
        rows: dict[str, dict[str, list[float]]] = json.loads(path.read_text()) if path.exists() else {}
        key = f"{form.key}, {len(self.evaluation)} images"
        if key not in rows:
            pipe = self._rounding(form.method) if form.kind == "bound" else load_pipeline(self._converted(form), "cpu")
            difference = self._images(pipe).astype(np.float64) - self.reference
            images = np.square(difference).mean(axis=tuple(range(1, difference.ndim)))
            rows[key] = {"images": np.maximum(images, LEAST_ERROR).tolist(), "steps": self._step_errors(pipe)}
            path.write_text(json.dumps(rows, indent=1) + "\n")
        return rows[key]

    def _images(self, pipe: Any) -> np.ndarray[Any, Any]:
        runs = [(prompt, SEED + place) for place, prompt in enumerate(self.evaluation)]
        outputs = run_prompts(pipe, runs, self.settings.completed(pipe))
        return np.stack([np.stack([np.asarray(frame.convert("RGB")) for frame in output]) for output in outputs])

    @torch.no_grad()
    def _step_errors(self, pipe: Any) -> list[float]:
        errors, squares = ([0.0] * TRACED_PROMPTS for _ in range(2))
        models = denoisers(pipe)
        for call in self.calls:
            found = _flat(models[call.model](*call.args, **call.kwargs))
            errors[call.prompt] += float((found - call.output).square().sum())
            squares[call.prompt] += float(call.output.square().sum())
        return [error / square for error, square in zip(errors, squares, strict=True)]

    def _rounding(self, method: str) -> Any:
        """The BF16 pipeline, whose layers have their inputs rounded as a method's runtime does."""
        pipe = load_pipeline(self.folder, "cpu")
        for model in denoisers(pipe).values():
            for stem in candidate_layers(model):
                model.get_submodule(stem).register_forward_pre_hook(_rounding_hook(method))
        return pipe

    def _converted(self, form: Form) -> Path:
        """The folder of the pipeline in some form, overwritten by the next."""
        folder = self.output / "converted"
        known = () if form.prompts == 0 else (self._statistics(form.prompts, form.steps),)
        moments = (self._moments(form.prompts, form.steps),) if form.kind == "moments" else ()
        rounding = form.kind if form.kind == "nearest" else None
        recipe = Recipe(
            form.method,
            calibration=known,
            moments=moments,
            rounding=rounding,
            runtime="diffusers",
            bf16_blocks=0,
            overwrite=True,
        )
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


def _keep_call(calls: list[Call], prompt: int, name: str, _model: nn.Module, *call: Any) -> None:
    args, kwargs, output = call
    calls.append(Call(prompt, name, args, kwargs, _flat(output)))


def _flat(output: Any) -> Tensor:
    """The numbers of a denoiser's output, of which some are lists of tensors, float32 [values]."""
    numbers = output[0] if isinstance(output, tuple) else output.sample
    parts = numbers if isinstance(numbers, list) else [numbers]
    return torch.cat([part.float().flatten() for part in parts])


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    return {name: pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None}


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """By how many dB errors fell in the mean, and the standard error of that."""
    gains = [decibels(first / second) for first, second in zip(before, after, strict=True)]
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


if __name__ == "__main__":
    sys.exit(main())
