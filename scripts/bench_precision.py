"""Mixed precision to a budget on the bundled pipeline: how well errors are predicted, and what the choices gain.

    predict   predicted against measured noise of single layers (float32) and of whole models (BF16): the rank
              correlation of the former, the worst factor of the latter
    bars      noise ratios of choices to a budget beside uniform formats, and beside other ways to choose layers

    python scripts/bench_precision.py predict --prompts 2
    python scripts/bench_precision.py bars --prompts 8

Statistics come from the calibration prompts, images from the evaluation prompts, which nothing was tuned on. The noise
ratio is that of `scripts/demo.py`.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from omni_convert.convert.calibration.generation import GenerationSettings, differentiable_images
from omni_convert.convert.calibration.prompts import Prompt, read_prompts
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.comparison.comparison import Variant, run_variant, settings_of
from omni_convert.convert.comparison.metrics import rmse
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.precision.analysis import Analysis, analyse
from omni_convert.convert.precision.choice import Unit
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import DEMO_EVALUATION_PROMPTS, DEMO_PIPELINE, DEMO_PROMPTS, resolve_source
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.formats.table import build_format
from omni_convert.loaders import load_pipeline
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear

SEED = 42
SINGLE, WHOLE = 40, 20
METHODS = ("nvfp4", "fp8", "mxfp4", "int8")
BITS = {"nvfp4": 4.5, "mxfp4": 8.25}
KEPT_PART = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predict", "bars"))
    parser.add_argument("--prompts", type=int, default=8, help="evaluation prompts")
    parser.add_argument("--single", type=int, default=SINGLE)
    parser.add_argument("--whole", type=int, default=WHOLE)
    parser.add_argument("--cases", default="", help="only cases of bars whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("precision-output"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers|transformers")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    calibration = options.output / "sensitivity.safetensors"
    if not calibration.exists():
        recipe = Recipe(calib=DEMO_PROMPTS)
        record_source(resolve_source(None), recipe, with_sensitivity=True).statistics.save(calibration)
    prompts = read_prompts(DEMO_EVALUATION_PROMPTS)[: options.prompts]
    (predict if options.what == "predict" else bars)(calibration, prompts, options)
    return 0


@dataclass(frozen=True)
class Case:
    """A way to convert.

    Attributes:
        predicted: noise ratio; None where none was predicted
    """

    name: str
    recipe: Recipe
    predicted: float | None = None


def bars(calibration: Path, prompts: Sequence[Prompt], options: argparse.Namespace) -> None:
    """Prints a line for each case: files of the transformer, predicted and measured noise ratio."""
    known = (calibration,)
    base = Variant("reference", str(DEMO_PIPELINE))
    settings = settings_of(base, {})
    reference = run_variant(base, prompts, settings, SEED)
    exact = run_variant(Variant("fp32", base.model, dtype=torch.float32), prompts, settings, SEED)
    noise = rmse(exact.images, reference.images)
    print(f"{len(prompts)} prompts; BF16 to FP32: RMSE {noise:.3f}")
    print(f"{'case':<34}{'MB':>7}{'predicted':>11}{'measured':>10}", flush=True)
    sizes: dict[str, float] = {}
    for case in cases(known, sizes):
        if options.cases not in case.name:
            continue
        folder = options.output / case.name.replace(" ", "-")
        report = convert_checkpoint(None, folder, replace(case.recipe, overwrite=True))
        size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        sizes[case.name] = size
        run = run_variant(Variant(case.name, str(folder)), prompts, settings, SEED)
        notes = [note for note in report.notes if "predicted noise ratio" in note]
        predicted = notes[0].rpartition(" ")[2] if notes else ""
        measured = rmse(reference.images, run.images) / noise
        print(f"{case.name:<34}{size / 1e6:>7.2f}{predicted:>11}{measured:>10.2f}", flush=True)


def cases(known: tuple[Path, ...], sizes: Mapping[str, float]) -> Iterator[Case]:
    """Uniform formats, choices to a budget, and for each of two formats all ways to keep a tenth of the weights."""
    yield Case("nvfp4", Recipe("nvfp4", calibration=known))
    if "nvfp4" in sizes:
        yield Case("nvfp4 +25 % bytes", Recipe(calibration=known, target_size=f"{round(1.25 * sizes['nvfp4'])}B"))
    yield Case("noise 2", Recipe(calibration=known, target_noise=2.0))
    yield Case("fp8", Recipe("fp8", calibration=known))
    for method in ("nvfp4", "mxfp4"):
        recipe = Recipe(method, calibration=known)
        bits = (1 - KEPT_PART) * BITS[method] + KEPT_PART * 16
        yield Case(f"{method} 10 % by choice", replace(recipe, target_bits=bits, formats=(method, "bf16")))
        for name, layers in kept_layers(method, known[0]).items():
            yield Case(f"{method} 10 % {name}", replace(recipe, ignored_layers=layers))


def kept_layers(method: str, calibration: Path) -> dict[str, tuple[str, ...]]:
    """The layers that other rules keep in BF16: as many as are in a tenth of the weights."""
    recipe = Recipe(method, calibration=(calibration,), formats=(method, "bf16"))
    table = analyse(resolve_source(None), recipe, Statistics.load(calibration))
    pipe = load_pipeline(DEMO_PIPELINE, "cpu")
    errors = {unit: weight_error(pipe.transformer, unit, method) for unit in table.units}
    orders: dict[str, Callable[[Unit], Any]] = {
        "first and last blocks": lambda unit: (block_rank(unit, table.units), unit.names),
        "by weight error": lambda unit: -errors[unit],
        "w2 of the first blocks": lambda unit: (not unit.names[0].endswith(".w2"), unit.names),
    }
    return {name: first_layers(sorted(table.units, key=order), table) for name, order in orders.items()}


def first_layers(units: Sequence[Unit], table: Analysis) -> tuple[str, ...]:
    """Layers of the first units that fit into a tenth of the weights."""
    room = KEPT_PART * table.weights
    layers: list[str] = []
    for unit in units:
        if unit.weights <= room:
            room -= unit.weights
            layers += unit.layers
    return tuple(layers)


def block_rank(unit: Unit, units: Sequence[Unit]) -> int:
    """0 for the first block, 0 for the last one, 1 for those beside them, ..."""
    blocks = list(dict.fromkeys(block_of(each) for each in units if each.names[0].startswith("layers.")))
    if block_of(unit) not in blocks:
        return len(blocks)
    place = blocks.index(block_of(unit))
    return min(place, len(blocks) - 1 - place)


def block_of(unit: Unit) -> str:
    return ".".join(unit.names[0].split(".")[:2])


def weight_error(model: nn.Module, unit: Unit, method: str) -> float:
    """Relative squared error of the weights of a unit."""
    fmt = build_format(method)
    error = norm = 0.0
    for layer in unit.layers:
        weight = model.get_parameter(f"{layer}.weight").detach()
        error += float((fmt.dequantize(fmt.quantize(weight)) - weight.float()).square().sum())
        norm += float(weight.float().square().sum())
    return error / norm


def predict(calibration: Path, prompts: Sequence[Prompt], options: argparse.Namespace) -> None:
    """Prints predicted and measured errors, and how well they agree."""
    statistics = Statistics.load(calibration)
    source = resolve_source(None)
    table = {}
    for method in METHODS:
        recipe = Recipe(method, calibration=(calibration,), formats=(method,))
        for unit in analyse(source, recipe, statistics).units:
            table[unit.names[0], method] = (unit, unit.option(method).error)
    analysis = analyse(source, Recipe("int8", calibration=(calibration,), formats=("int8",)), statistics)
    names = [unit.names[0] for unit in analysis.units]
    chance = random.Random(0)
    precise, usual = (Demo(dtype, statistics, prompts) for dtype in (torch.float32, torch.bfloat16))
    print(f"{'single layer':<48}{'predicted':>10}{'measured':>10}  RMSE in grey levels")
    pairs = []
    for name, method in chance.sample(sorted(table), min(options.single, len(table))):
        unit, error = table[name, method]
        measured = precise.error({unit: method})
        pairs.append((255 * math.sqrt(error), measured))
        print(f"{name + ' ' + method:<48}{pairs[-1][0]:>10.3f}{measured:>10.3f}", flush=True)
    if len(pairs) > 1:
        print(f"rank correlation of {len(pairs)}: {rank_correlation(pairs):.3f}")
    noise = rms(rounded(precise.images), rounded(usual.images))
    print(f"{'whole model':<48}{'predicted':>10}{'measured':>10}  noise ratio")
    factors = []
    for label, choice in whole_choices(names, chance, options.whole):
        units = {table[name, method][0]: method for name, method in choice.items()}
        predicted = analysis.noise_ratio(math.fsum(table[name, method][1] for name, method in choice.items()))
        measured = usual.rounded_error(units) / noise
        factors.append(max(predicted / measured, measured / predicted))
        print(f"{label:<48}{predicted:>10.2f}{measured:>10.2f}", flush=True)
    if factors:
        print(f"worst factor of {len(factors)}: {max(factors):.2f}")


def whole_choices(names: Sequence[str], chance: random.Random, count: int) -> Iterator[tuple[str, dict[str, str]]]:
    """The uniform choices, then random ones by role and by layer."""
    choices = [(f"uniform {method}", dict.fromkeys(names, method)) for method in METHODS]
    roles = sorted({name.rpartition(".")[2] for name in names})
    while len(choices) < count:
        number = len(choices)
        if number % 2:
            by_role = {role: chance.choice((*METHODS, "bf16")) for role in roles}
            choice = {name: by_role[name.rpartition(".")[2]] for name in names}
        else:
            choice = {name: chance.choice((*METHODS, "bf16")) for name in names}
        kept = {name: method for name, method in choice.items() if method != "bf16"}
        if kept:
            choices.append((f"random by {'role' if number % 2 else 'layer'} {number}", kept))
    return iter(choices[:count])


class Demo:
    """The bundled pipeline in a dtype, its images, and those with some layers quantized."""

    def __init__(self, dtype: torch.dtype, statistics: Statistics, prompts: Sequence[Prompt]) -> None:
        self._pipe = load_pipeline(DEMO_PIPELINE, "cpu", dtype)
        for model in self._pipe.components.values():
            if isinstance(model, nn.Module):
                model.requires_grad_(False)
        self._statistics = statistics
        self._prompts = prompts
        self._settings = GenerationSettings.for_pipeline(DEMO_PIPELINE)
        self.images = self._run()

    def error(self, choice: Mapping[Unit, str]) -> float:
        """RMSE in grey levels, not rounded, of the images with these units in these methods."""
        return rms(self.images, self._changed(choice))

    def rounded_error(self, choice: Mapping[Unit, str]) -> float:
        """The same with images in whole grey levels."""
        return rms(rounded(self.images), rounded(self._changed(choice)))

    @torch.no_grad()
    def _changed(self, choice: Mapping[Unit, str]) -> Tensor:
        model = self._pipe.transformer
        kept = {layer: model.get_submodule(layer) for unit in choice for layer in unit.layers}
        for unit, method in choice.items():
            for layer in unit.layers:
                model.set_submodule(layer, self._quantized(kept[layer], unit, method))
        try:
            return self._run()
        finally:
            for layer, module in kept.items():
                model.set_submodule(layer, module)

    def _quantized(self, linear: nn.Module, unit: Unit, method: str) -> nn.Module:
        inputs = self._statistics.inputs_of("transformer", unit.layers)
        fmt = build_format(method, static=True, smooth=True)
        assert isinstance(linear, nn.Linear), "units are linears"
        return QuantizedLinear.from_linear(linear, fmt, inputs)

    def _run(self) -> Tensor:
        runs = enumerate(self._prompts)
        images = [differentiable_images(self._pipe, prompt, self._settings, SEED + place) for place, prompt in runs]
        return 255 * torch.cat(images).float()


def rounded(images: Tensor) -> Tensor:
    return images.clamp(0, 255).round()


def rms(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().mean().sqrt())


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's."""
    ranks: npt.NDArray[Any] = np.array([np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True)])
    return float(np.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    sys.exit(main())
