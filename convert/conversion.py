"""One conversion as a whole: from a model and a recipe to a folder that a runtime loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omni_convert.convert.device import resolve_device
from omni_convert.convert.execution.component_result import LayerResult
from omni_convert.convert.execution.journal import JOURNAL, Journal
from omni_convert.convert.execution.local import Engine, Progress
from omni_convert.convert.output.copy import copy_file, take_files
from omni_convert.convert.output.destination import Destination, destination_of
from omni_convert.convert.output.folder import write_text
from omni_convert.convert.output.manifest import describe_job, read_results, write_json, write_manifest
from omni_convert.convert.output.model_card import model_card
from omni_convert.convert.output.upload import Repository, open_repository
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.plan import Plan, plan_conversion
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.report import ConversionReport
from omni_convert.convert.source.file_check import refuse_changed_files
from omni_convert.convert.source.file_hash import SourceHashes
from omni_convert.convert.source.location import Source, resolve_source
from omni_convert.convert.workers import Workers, available_cores
from omni_convert.formats.errors import RecipeError

if TYPE_CHECKING:
    from omni_convert.convert.precision.mixture import Mixture
    from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["Conversion", "convert_checkpoint"]

# Folder inside OUT.partial for files from the Hub; it is removed before OUT.partial becomes OUT.
DOWNLOADS = ".downloads"


def convert_checkpoint(
    model: str | Path | None, output: str | Path, recipe: Recipe | None = None, *, progress: Progress | None = None
) -> ConversionReport:
    """Converts a diffusers pipeline (or a single component) into a quantized one.

    Args:
        model: pipeline folder, Hub repo id, component folder or .safetensors file; None for the bundled demo
        output: folder to create, or a URL for fsspec (`s3://bucket/out`)
        recipe: what to do; FP8 by default
        progress: called after each step with the number of source bytes that it has processed

    Raises:
        OmniConvertError: the user can fix the cause; `output` then does not exist.
    """
    conversion = Conversion.prepare(model, output, recipe or Recipe())
    conversion.calibrate()
    report = conversion.execute(progress or _ignore)
    conversion.push()
    return report


@dataclass
class Conversion:
    """One conversion from request to result: prepare, calibrate, execute, push, in this order.

    Attributes:
        plan: what becomes of every tensor
        target: where the output goes
        repository: the repository on the Hub to upload to, already checked and open; None if there is none
        calibration_seconds: time that recording statistics took; None if none were recorded
        growth: lines that say how much the layers' largest inputs still grew over the last prompts
        mixture: the choice that the recipe's budget led to; None without a budget, or before calibration
    """

    plan: Plan
    target: Destination
    repository: Repository | None = None
    calibration_seconds: float | None = None
    growth: tuple[str, ...] = ()
    mixture: Mixture | None = None

    @classmethod
    def prepare(
        cls, model: str | Path | None, output: str | Path | None, recipe: Recipe, *, dry_run: bool = False
    ) -> Conversion:
        """Finds the model, plans the conversion and opens the repository; all errors of the user are raised here.

        Args:
            model, output: see `convert_checkpoint`; output None is a folder named after model and method
            recipe: what to do
            dry_run: make the plan alone: the output is not checked, and no repository is opened

        Raises:
            OmniConvertError: the recipe cannot be carried out, or the output is in the way.
        """
        _check_budget(recipe)  # this and the next before anything is downloaded
        if output is not None and not dry_run:
            destination_of(output).check(recipe)
        source = resolve_source(model, recipe.revision, stream=recipe.streams_source)
        source = replace(source, files=recipe.component_files)
        target = destination_of(output or f"{source.short_name}-{recipe.outcome}")
        if not dry_run:
            target.check(recipe, source)
        if recipe.calibration:
            from omni_convert.formats.statistics.statistics import Statistics

            scratch = None if dry_run else target.work.parent
            plan, mixture = _planned(source, recipe, Statistics.load_all(recipe.calibration), scratch)
        else:
            plan, mixture = plan_conversion(source, recipe), None
        if dry_run and recipe.calib is not None:
            plan = replace(plan, notes=(*plan.notes, "a real run first records statistics over the prompts"))
        if dry_run or recipe.push_to_hub is None:
            return cls(plan, target, mixture=mixture)
        return cls(plan, target, open_repository(recipe.push_to_hub, private=recipe.private), mixture=mixture)

    def calibrate(self) -> None:
        """Records statistics if the recipe names prompts, and attaches them to the plan.

        Raises:
            OmniConvertError: the pipeline cannot be run, or computes NaN.
        """
        if self.plan.recipe.calib is None:
            return
        from omni_convert.convert.calibration.growth import growth_report
        from omni_convert.convert.calibration.recording import record_source  # runs a pipeline: seconds of imports

        started = time.monotonic()
        source, recipe = self.plan.source, self.plan.recipe
        is_mixed, keep = recipe.budget is not None, self._finished_prompts
        keep.parent.mkdir(parents=True, exist_ok=True)
        recording = record_source(source, recipe, self.plan.weights, with_sensitivity=is_mixed, keep=keep)
        statistics = recording.statistics
        statistics.save(keep)
        if is_mixed:
            self.plan, self.mixture = _planned(source, recipe, statistics, self.target.work.parent)
        else:
            self.plan = self.plan.with_statistics(statistics)
        self.growth = tuple(growth_report(recording.growth))
        self.calibration_seconds = time.monotonic() - started

    def execute(self, progress: Progress) -> ConversionReport:
        """Writes the output; raises the same errors as `convert_checkpoint`."""
        started = time.monotonic()
        plan, recipe = self.plan, self.plan.recipe
        if recipe.resume:
            with self.target.finished() as finished:
                if finished is not None:
                    return self._report(read_results(finished, plan), time.monotonic() - started, None)
        with (
            _opened_engine(recipe) as engine_on,
            self.target.opened(recipe) as folder,
            Journal(folder / JOURNAL, describe_job(plan)) as journal,
            Workers(_threads(recipe)) as workers,
            _streaming(plan.source, folder),  # ends first: workers must not wait for a download any more
        ):
            results, peak = _fill(folder, plan, engine_on(workers, journal), self.target, progress, self._pictures())
        self._finished_prompts.unlink(missing_ok=True)
        return self._report(results, time.monotonic() - started, peak)

    def push(self) -> str | None:
        """Uploads the output if the recipe asks for it, and returns the commit's address.

        Raises:
            HubError: the Hub refuses the upload, or cannot be reached.
        """
        return None if self.repository is None else self.target.push(self.repository)

    def _pictures(self) -> dict[str, str]:
        """The pictures of the model card, by the names of their files."""
        if self.mixture is None:
            return {}
        from omni_convert.convert.page.choice_pictures import card_pictures

        return card_pictures(self.mixture)

    @property
    def _finished_prompts(self) -> Path:
        """The file of statistics that an interrupted run leaves beside its work."""
        return self.target.work.with_name(f"{self.target.work.name}.statistics")

    def _report(
        self, results: dict[str, list[LayerResult]], seconds: float, peak_memory: int | None
    ) -> ConversionReport:
        plan = self.plan
        return ConversionReport(
            self.target.place,
            tuple(_prefixed(name, layer) for name, layers in results.items() for layer in layers),
            tuple(layer for component in plan.components for layer in component.kept),
            (*plan.notes, *self.growth),
            plan.bytes_before,
            plan.bytes_after,
            seconds,
            self.calibration_seconds,
            peak_memory,
            has_lora=bool(plan.loras),
            rounding=plan.rounding,
        )


def _check_budget(recipe: Recipe) -> None:
    """Raises RecipeError if a budget lacks what it needs, or an option that refines a budget stands alone.

    Raises CalibrationError if the prompts of its trial cannot be read.
    """
    if recipe.budget is None:
        for name in ("formats", "analysis", "trial"):
            if getattr(recipe, name):
                raise RecipeError(
                    f"--{name}: found without a budget, expected --target-size, --target-noise or another"
                )
    elif recipe.is_transcoding:
        raise RecipeError(f"{recipe.budget}: found with -m {recipe.method}, which chooses no formats")
    elif not recipe.is_calibrated:
        raise RecipeError(
            f"{recipe.budget}: found no statistics; add --calib PROMPTS, or --calibration FILE of "
            "`omni-convert calibrate --sensitivity`"
        )
    if recipe.trial is not None:
        from omni_convert.convert.calibration.prompts import read_prompts

        read_prompts(recipe.trial)


def _planned(
    source: Source, recipe: Recipe, statistics: Statistics, scratch: Path | None
) -> tuple[Plan, Mixture | None]:
    """The plan with statistics, and with the formats that a budget chooses, if the recipe has one.

    Args:
        scratch: folder for conversions that are only tried; None tries none
    """
    if recipe.budget is None:
        return plan_conversion(source, recipe).with_statistics(statistics), None
    from omni_convert.convert.precision.mixture import choose_mixture

    mixture = choose_mixture(source, recipe, statistics)
    if recipe.trial is not None and scratch is not None:
        from omni_convert.convert.trial import tried  # runs a pipeline: seconds of imports

        scratch.mkdir(parents=True, exist_ok=True)
        mixture = tried(source, recipe, statistics, mixture, _converted_to, scratch)
    plan = plan_conversion(source, recipe, mixture.chosen).with_statistics(statistics)
    return replace(plan, notes=tuple(filter(None, (*plan.notes, mixture.note, mixture.trial_note)))), mixture


def _converted_to(plan: Plan, folder: Path) -> None:
    """Writes what is planned to a new folder."""
    Conversion(plan, destination_of(folder)).execute(_ignore)


@contextmanager
def _opened_engine(recipe: Recipe) -> Iterator[Callable[[Workers, Journal], Engine]]:
    """Yields a function that makes the engine; holds the connection to a cluster meanwhile, if there is one."""
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
    """Downloads weights while they are needed, if they are still on the Hub."""
    return source.hub_files.kept_in(folder / DOWNLOADS) if source.hub_files is not None else nullcontext()


def _threads(recipe: Recipe) -> int:
    """Number of threads of this process; with a cluster, `--workers` counts the threads of each task."""
    return available_cores() if recipe.is_distributed or not recipe.workers else recipe.workers


def _fill(
    folder: Path, plan: Plan, engine: Engine, target: Destination, progress: Progress, pictures: Mapping[str, str]
) -> tuple[dict[str, list[LayerResult]], int]:
    """Writes every file of the output; returns the layers of each component, and the peak memory in bytes.

    Args:
        pictures: name of the file → SVG, beside the model card
    """
    hub_files = plan.source.hub_files
    on_hub = [name for name in plan.copies if hub_files is not None and name in hub_files.streamed]
    copies = {
        name: engine.workers.submit(copy_file, engine, name, path, folder / name)
        for name, path in plan.copies.items()
        if name not in on_hub
    }
    moves = engine.workers.submit(take_files, engine, hub_files, on_hub, folder) if hub_files is not None else None
    checks = [] if plan.recipe.force else [
        engine.workers.submit(refuse_changed_files, path, components) for path, components in _read_folders(plan)
    ]  # fmt: skip
    results: dict[str, list[LayerResult]] = {}
    known: dict[str, str] = {}
    peak = 0
    source_hashes = SourceHashes(plan.source_files, engine.workers) if plan.recipe.verify_source else None
    for component in plan.components:
        place = folder / component.name
        place.mkdir(exist_ok=True)
        _write_config(component, place)
        result = target.make(component, place, engine, progress)
        results[component.name] = result.layers
        known |= {(Path(component.name) / file).as_posix(): sha256 for file, sha256 in result.sha256.items()}
        peak = max(peak, result.peak_memory)
    sources = source_hashes.results() if source_hashes is not None else {}
    known |= {name: copy.result() for name, copy in copies.items()}
    known |= moves.result() if moves is not None else {}
    if hub_files is not None:
        hub_files.clear()
    for check in checks:
        check.result()
    for name, picture in pictures.items():
        write_text(folder / name, picture)
    write_text(folder / "README.md", model_card(plan, dict(results), tuple(pictures)))
    write_manifest(folder, plan, results, known, sources)
    return results, peak


def _read_folders(plan: Plan) -> Iterator[tuple[Path, list[str]]]:
    """The places on the disk from which weights are read, each with the components that are read there."""
    files = plan.source.files
    names = [component.name for component in plan.components if component.name not in files]
    if names and plan.source.hub_files is None:
        yield plan.source.path, names
    yield from ((path, [""]) for path in files.values())


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
