"""`convert_checkpoint`: the whole job, from what the user asked for to a folder that a runtime loads."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omni_convert.convert.execute import LayerResult, Progress, execute_component
from omni_convert.convert.manifest import write_json, write_manifest
from omni_convert.convert.model_card import model_card
from omni_convert.convert.output import check_output, partial_folder
from omni_convert.convert.plan import ComponentPlan, Plan, plan_conversion
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.report import ConversionReport
from omni_convert.convert.source import Source, resolve_source
from omni_convert.formats.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, OutputError, RecipeError

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
    check_output(Path(output), overwrite=recipe.overwrite)
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
    device = resolve_device(plan.recipe.device)
    results: dict[str, list[LayerResult]] = {}
    peak = 0
    with partial_folder(output, overwrite=plan.recipe.overwrite) as partial:
        _copy_files(plan, partial)
        for component in plan.components:
            folder = partial / component.name
            folder.mkdir(exist_ok=True)
            layers, component_peak = execute_component(component, folder, device, progress or _ignore)
            results[component.name] = layers
            peak = max(peak, component_peak)
            _write_config(component, folder)
            _verify(component, folder)
        (partial / "README.md").write_text(model_card(plan, dict(results)), encoding="utf-8")
        write_manifest(partial, plan, results, recorded.fingerprint() if recorded is not None else None)
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


def _copy_files(plan: Plan, folder: Path) -> None:
    for name, path in plan.copies.items():
        target = folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        except OSError as error:
            raise OutputError(f"{target}: cannot be copied from {path} ({error.strerror})") from None


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
