"""`convert_checkpoint`: the whole job, from what the user asked for to a folder that a runtime loads."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omni_convert.convert.copy import copy_file, file_sha256
from omni_convert.convert.execute import Engine, LayerResult, Progress, execute_component
from omni_convert.convert.journal import JOURNAL, Journal
from omni_convert.convert.manifest import describe_job, read_results, write_json, write_manifest
from omni_convert.convert.model_card import model_card
from omni_convert.convert.output import check_output, is_finished, partial_folder, write_text
from omni_convert.convert.plan import ComponentPlan, Plan, plan_conversion
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.report import ConversionReport
from omni_convert.convert.source import Source, resolve_source
from omni_convert.convert.workers import Workers, available_cores
from omni_convert.formats.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from omni_convert.convert.statistics import Statistics

__all__ = ["convert_checkpoint", "convert_plan", "load_statistics", "planned_without_running", "resolve_device"]


def convert_checkpoint(
    model: str | Path | None, output: str | Path, recipe: Recipe | None = None, *, progress: Progress | None = None
) -> ConversionReport:
    """Converts a diffusers pipeline (or a single component) into a quantized one.

    Args:
        model: pipeline folder, Hub repo id, component folder or .safetensors file; None for the bundled demo
        output: folder to create
        recipe: what to do; FP8 by default
        progress: called with the number of source bytes that each step has dealt with

    Raises:
        OmniConvertError: anything that the user can do something about; `output` then does not exist.
    """
    recipe = recipe or Recipe()
    check_output(Path(output), overwrite=recipe.overwrite, resume=recipe.resume)
    source = resolve_source(model, recipe.revision)
    recorded = load_statistics(source, recipe)
    return convert_plan(plan_conversion(source, recipe, recorded), Path(output), recorded, progress)


def load_statistics(source: Source, recipe: Recipe) -> Statistics | None:
    """The statistics that the recipe asks for: read from files, recorded now from prompts, or none.

    The plan is tried without statistics first: a mistake in the recipe must show before the pipeline runs for hours.
    """
    if recipe.calibration:
        from omni_convert.convert.statistics import Statistics

        first, *others = [Statistics.load(path) for path in recipe.calibration]
        return first.merge(others)
    if recipe.calib is None:
        return None
    from omni_convert.convert.calibration import calibrate_source  # runs a pipeline: seconds of imports

    plan_conversion(source, replace(recipe, activation_scheme=None))
    return calibrate_source(source, recipe)


def planned_without_running(source: Source, recipe: Recipe) -> Plan:
    """The plan for `--dry-run`: statistics that are on disk are used, a pipeline is not run to record them."""
    if recipe.calib is None:
        return plan_conversion(source, recipe, load_statistics(source, recipe))
    plan = plan_conversion(source, replace(recipe, activation_scheme=None))
    return replace(plan, notes=(*plan.notes, "a real run calibrates first; activations are then static where possible"))


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU.

    Raises:
        RecipeError: torch does not know the device or has none of that kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RecipeError(f"--device: found '{name}', which this torch cannot use ({reason})") from None
    return device


def convert_plan(
    plan: Plan, output: Path, recorded: Statistics | None = None, progress: Progress | None = None
) -> ConversionReport:
    """Carries out a plan; see `convert_checkpoint`."""
    started = time.monotonic()
    recipe = plan.recipe
    device = resolve_device(recipe.device)
    statistics_id = recorded.fingerprint() if recorded is not None else None
    if recipe.resume and is_finished(output):
        return _report(plan, output, read_results(output, plan, statistics_id), started, 0)
    with (
        partial_folder(output, overwrite=recipe.overwrite, resume=recipe.resume) as folder,
        Journal(folder / JOURNAL, describe_job(plan, statistics_id)) as journal,
        Workers(recipe.workers or available_cores()) as workers,
    ):
        results, peak = _fill(folder, plan, statistics_id, Engine(workers, device, journal), progress or _ignore)
    return _report(plan, output, results, started, peak)


def _fill(
    folder: Path, plan: Plan, statistics_id: str | None, engine: Engine, progress: Progress
) -> tuple[dict[str, list[LayerResult]], int]:
    """Makes every file of the output; returns the layers of each component, and the peak of memory."""
    copies = {
        name: engine.workers.submit(copy_file, engine, name, path, folder / name) for name, path in plan.copies.items()
    }
    results: dict[str, list[LayerResult]] = {}
    known: dict[str, str] = {}
    peak = 0
    for component in plan.components:
        place = folder / component.name
        place.mkdir(exist_ok=True)
        result = execute_component(component, place, engine, progress)
        results[component.name] = result.layers
        known |= {(Path(component.name) / file).as_posix(): sha256 for file, sha256 in result.sha256.items()}
        peak = max(peak, result.peak_memory)
        _write_config(component, place)
        _verify(component, place)
    sources = _source_hashes(plan, engine.workers) if plan.recipe.verify_source else {}
    known |= {name: copy.result() for name, copy in copies.items()}
    write_text(folder / "README.md", model_card(plan, dict(results)))
    write_manifest(folder, plan, results, statistics_id, known, sources)
    return results, peak


def _source_hashes(plan: Plan, workers: Workers) -> dict[Path, str]:
    """SHA-256 of every file of weights of the source."""
    paths = [file.path for component in plan.components for file in component.checkpoint.files.values()]
    hashes = workers.in_order((partial(file_sha256, path) for path in paths), ahead=len(paths))
    return dict(zip(paths, hashes, strict=True))


def _report(
    plan: Plan, output: Path, results: dict[str, list[LayerResult]], started: float, peak: int
) -> ConversionReport:
    return ConversionReport(
        output,
        tuple(_prefixed(name, layer) for name, layers in results.items() for layer in layers),
        tuple(layer for component in plan.components for layer in component.kept),
        plan.notes,
        plan.bytes_before,
        plan.bytes_after,
        time.monotonic() - started,
        peak,
    )


def _ignore(_: int) -> None:
    return None


def _prefixed(component: str, layer: LayerResult) -> LayerResult:
    return replace(layer, name=f"{component}.{layer.name}") if component else layer


def _write_config(component: ComponentPlan, folder: Path) -> None:
    write_json(folder / "config.json", component.config)
    if component.shards.index is not None:
        write_json(folder / component.shards.index_name, component.shards.index)


def _verify(component: ComponentPlan, folder: Path) -> None:
    """Reopens what was written: every planned tensor is there, in the planned dtype and shape."""
    written = Checkpoint.open(folder)
    planned = {spec.name: spec for specs in component.shards.files.values() for spec in specs}
    if dict(written) != planned:
        differing = sorted(set(written.items()) ^ set(planned.items()))
        raise CheckpointError(
            f"{folder}: found other tensors than planned, first {differing[0][0]}; please report this"
        )
