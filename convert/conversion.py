"""`convert_checkpoint`: the whole job, from what the user asked for to a folder that a runtime loads."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omni_convert.convert.device import resolve_device
from omni_convert.convert.execution.component_result import ComponentResult, LayerResult
from omni_convert.convert.execution.journal import JOURNAL, Journal
from omni_convert.convert.execution.local import Engine, Progress, execute_component
from omni_convert.convert.output.copy import copy_file, take_files
from omni_convert.convert.output.folder import check_output, is_finished, partial_folder, tidy, write_text
from omni_convert.convert.output.manifest import describe_job, read_results, write_json, write_manifest
from omni_convert.convert.output.model_card import model_card
from omni_convert.convert.output.remote_folder import (
    RemoteFolder,
    check_remote,
    finished_manifest,
    output_of,
    published_folder,
)
from omni_convert.convert.output.shard_upload import upload_component
from omni_convert.convert.output.upload import Repository, open_repository, push_output
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.plan import Plan, plan_conversion
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.report import ConversionReport
from omni_convert.convert.source.file_hash import SourceHashes
from omni_convert.convert.source.location import Source, resolve_source
from omni_convert.convert.workers import Workers, available_cores
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, OutputError, RecipeError

if TYPE_CHECKING:
    from omni_convert.convert.calibration.statistics import Statistics

__all__ = [
    "check_target",
    "convert_checkpoint",
    "convert_plan",
    "load_statistics",
    "planned_without_running",
    "prepare_push",
]

# Of what comes from the Hub, inside OUT.partial; gone before that becomes OUT.
DOWNLOADS = ".downloads"


def convert_checkpoint(
    model: str | Path | None, output: str | Path, recipe: Recipe | None = None, *, progress: Progress | None = None
) -> ConversionReport:
    """Converts a diffusers pipeline (or a single component) into a quantized one.

    Args:
        model: pipeline folder, Hub repo id, component folder or .safetensors file; None for the bundled demo
        output: folder to create, or a URL for fsspec (`s3://bucket/out`)
        recipe: what to do; FP8 by default
        progress: called with the number of source bytes that each step has dealt with

    Raises:
        OmniConvertError: anything that the user can do something about; `output` then does not exist.
    """
    recipe = recipe or Recipe()
    target = output_of(output)
    check_target(target, recipe)
    source = resolve_source(model, recipe.revision, stream=recipe.streams_source)
    repository = prepare_push(source, recipe)
    recorded, seconds = load_statistics(source, recipe)
    report = convert_plan(plan_conversion(source, recipe, recorded), target, recorded, progress, seconds)
    if repository is not None and isinstance(target, Path):
        push_output(target, repository)
    return report


def check_target(output: Path | RemoteFolder, recipe: Recipe) -> None:
    """Refuses an output that is in the way, before any work is done.

    Raises:
        OutputError: something is there.
        RecipeError: what is at a URL cannot be pushed to the Hub.
    """
    if isinstance(output, Path):
        check_output(output, overwrite=recipe.overwrite, resume=recipe.resume)
        return
    if recipe.push_to_hub is not None:
        raise RecipeError(f"--push-to-hub: found --output {output}, expected a folder, whose files can be sent")
    check_remote(output, overwrite=recipe.overwrite, resume=recipe.resume)


def prepare_push(source: Source, recipe: Recipe) -> Repository | None:
    """The repository that the recipe wants the output in: what is wrong there must show before hours of work.

    So must a mistake in the recipe, which should leave no empty repository behind.
    """
    if recipe.push_to_hub is None:
        return None
    plan_conversion(source, replace(recipe, activation_scheme=None) if recipe.calib is not None else recipe)
    return open_repository(recipe.push_to_hub, private=recipe.private)


def load_statistics(source: Source, recipe: Recipe) -> tuple[Statistics | None, float | None]:
    """The statistics that the recipe asks for: read from files, recorded now from prompts, or none.

    The plan is tried without statistics first: a mistake in the recipe must show before the pipeline runs for hours.

    Returns:
        the statistics, and the seconds that it took to record them; None if they were not
    """
    if recipe.calibration:
        from omni_convert.convert.calibration.statistics import Statistics

        first, *others = [Statistics.load(path) for path in recipe.calibration]
        return first.merge(others), None
    if recipe.calib is None:
        return None, None
    from omni_convert.convert.calibration.recording import calibrate_source  # runs a pipeline: seconds of imports

    plan_conversion(source, replace(recipe, activation_scheme=None))
    started = time.monotonic()
    return calibrate_source(source, recipe), time.monotonic() - started


def planned_without_running(source: Source, recipe: Recipe) -> Plan:
    """The plan for `--dry-run`: statistics that are on disk are used, a pipeline is not run to record them."""
    if recipe.calib is None:
        return plan_conversion(source, recipe, load_statistics(source, recipe)[0])
    plan = plan_conversion(source, replace(recipe, activation_scheme=None))
    return replace(plan, notes=(*plan.notes, "a real run calibrates first; activations are then static where possible"))


def convert_plan(
    plan: Plan,
    output: Path | RemoteFolder,
    recorded: Statistics | None = None,
    progress: Progress | None = None,
    calibration_seconds: float | None = None,
) -> ConversionReport:
    """Carries out a plan; see `convert_checkpoint`.

    Args:
        recorded, calibration_seconds: see `load_statistics`
    """
    started = time.monotonic()
    if isinstance(output, Path):
        _refuse_source(output.resolve(), plan.source.path.resolve())
    recipe = plan.recipe
    statistics_id = recorded.fingerprint() if recorded is not None else None
    if recipe.resume and (finished := _results_of_finished(output, plan, statistics_id)) is not None:
        return _report(plan, output, finished, time.monotonic() - started, calibration_seconds, None)
    with (
        _opened_engine(recipe) as engine_on,
        _folder_of(output, recipe) as folder,
        Journal(folder / JOURNAL, describe_job(plan, statistics_id)) as journal,
        Workers(_threads(recipe)) as workers,
        _streaming(plan.source, folder),  # ends first: workers that wait for a download shall not
    ):
        make = execute_component if isinstance(output, Path) else partial(upload_component, output)
        results, peak = _fill(folder, plan, statistics_id, engine_on(workers, journal), make, progress or _ignore)
    return _report(plan, output, results, time.monotonic() - started, calibration_seconds, peak)


def _refuse_source(output: Path, source: Path) -> None:
    if output == source or source in output.parents or output in source.parents:
        raise OutputError(f"{output}: found the folder of the model that is read ({source}); name another --output")


def _results_of_finished(
    output: Path | RemoteFolder, plan: Plan, statistics_id: str | None
) -> dict[str, list[LayerResult]] | None:
    """The layers of an output that is there already; None if it is not."""
    if isinstance(output, Path):
        if not is_finished(output):
            return None
        tidy(output)
        return read_results(output, plan, statistics_id)
    with tempfile.TemporaryDirectory() as folder:
        return read_results(Path(folder), plan, statistics_id) if finished_manifest(output, Path(folder)) else None


def _folder_of(output: Path | RemoteFolder, recipe: Recipe) -> AbstractContextManager[Path]:
    """Where to make the files of an output, until it is whole."""
    if isinstance(output, Path):
        return partial_folder(output, overwrite=recipe.overwrite, resume=recipe.resume)
    return published_folder(output, overwrite=recipe.overwrite, resume=recipe.resume)


@contextmanager
def _opened_engine(recipe: Recipe) -> Iterator[Callable[[Workers, Journal], Engine]]:
    """What makes the engine of the threads and the journal; a cluster is connected to meanwhile."""
    if not recipe.is_distributed:
        device = resolve_device(recipe.device)
        yield lambda workers, journal: Engine(workers, device, journal)
        return
    from omni_convert.convert.cluster import connect  # an extra
    from omni_convert.convert.execution.distributed import RayEngine

    with connect(recipe.engine) as cluster:
        device = cluster.device(recipe.device)
        slots = cluster.slots(recipe.workers, needs_gpu=device.type == "cuda")
        yield lambda workers, journal: RayEngine(workers, device, journal, cluster, slots)


def _streaming(source: Source, folder: Path) -> AbstractContextManager[None]:
    """Has weights come from the Hub while they are needed, if that is where they are."""
    return source.hub_files.kept_in(folder / DOWNLOADS) if source.hub_files is not None else nullcontext()


def _threads(recipe: Recipe) -> int:
    """Of this process; `--workers` of a cluster are those of each task."""
    return available_cores() if recipe.is_distributed or not recipe.workers else recipe.workers


def _fill(
    folder: Path,
    plan: Plan,
    statistics_id: str | None,
    engine: Engine,
    make: Callable[[ComponentPlan, Path, Engine, Progress], ComponentResult],
    progress: Progress,
) -> tuple[dict[str, list[LayerResult]], int]:
    """Makes every file of the output; returns the layers of each component, and the peak of memory."""
    hub_files = plan.source.hub_files
    on_hub = [name for name in plan.copies if hub_files is not None and name in hub_files.streamed]
    copies = {
        name: engine.workers.submit(copy_file, engine, name, path, folder / name)
        for name, path in plan.copies.items()
        if name not in on_hub
    }
    moves = engine.workers.submit(take_files, engine, hub_files, on_hub, folder) if hub_files is not None else None
    results: dict[str, list[LayerResult]] = {}
    known: dict[str, str] = {}
    peak = 0
    source_hashes = SourceHashes(plan.source_files, engine.workers) if plan.recipe.verify_source else None
    for component in plan.components:
        place = folder / component.name
        place.mkdir(exist_ok=True)
        result = make(component, place, engine, progress)
        results[component.name] = result.layers
        known |= {(Path(component.name) / file).as_posix(): sha256 for file, sha256 in result.sha256.items()}
        peak = max(peak, result.peak_memory)
        _write_config(component, place)
        if make is execute_component:
            _verify(component, place)
    sources = source_hashes.results() if source_hashes is not None else {}
    known |= {name: copy.result() for name, copy in copies.items()}
    known |= moves.result() if moves is not None else {}
    if hub_files is not None:
        hub_files.clear()
    write_text(folder / "README.md", model_card(plan, dict(results)))
    write_manifest(folder, plan, results, statistics_id, known, sources)
    return results, peak


def _report(
    plan: Plan,
    output: Path | RemoteFolder,
    results: dict[str, list[LayerResult]],
    seconds: float,
    calibration_seconds: float | None,
    peak: int | None,
) -> ConversionReport:
    return ConversionReport(
        output,
        tuple(_prefixed(name, layer) for name, layers in results.items() for layer in layers),
        tuple(layer for component in plan.components for layer in component.kept),
        plan.notes,
        plan.bytes_before,
        plan.bytes_after,
        seconds,
        calibration_seconds,
        peak,
    )


def _ignore(_: int) -> None:
    return None


def _prefixed(component: str, layer: LayerResult) -> LayerResult:
    return replace(layer, name=f"{component}.{layer.name}") if component else layer


def _write_config(component: ComponentPlan, folder: Path) -> None:
    if component.config:
        write_json(folder / "config.json", component.config)
    for name, content in component.sidecars.items():
        write_json(folder / name, content)
    if component.shards.index is not None:
        write_json(folder / component.shards.index_name, component.shards.index)


def _verify(component: ComponentPlan, folder: Path) -> None:
    """Reopens what was written: every planned tensor is there, in the planned dtype and shape."""
    if component.shards.gguf is not None:
        from omni_convert.formats.containers.gguf_writer import check_gguf

        for file, specs in component.shards.files.items():
            check_gguf(folder / file, specs, component.shards.gguf)
        return
    written = Checkpoint.open(folder)
    planned = {spec.name: spec for specs in component.shards.files.values() for spec in specs}
    if dict(written) != planned:
        differing = sorted(set(written.items()) ^ set(planned.items()))
        raise CheckpointError(
            f"{folder}: found other tensors than planned, first {differing[0][0]}; please report this"
        )
