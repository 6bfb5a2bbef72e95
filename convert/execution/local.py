"""Carries out a plan: tiles are read, quantized and written by all workers at once, each at its final place.

    steps ─► prepare (scales of the group; a few steps ahead) ─► tiles (a few ahead) ─► results, in order

Memory holds the tiles under way, one per worker. Nothing depends on which worker does which tile, or when.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from omni_convert.convert.execution.component_result import ComponentResult, layer_results
from omni_convert.convert.execution.journal import EarlierRecords, Record, Records
from omni_convert.convert.execution.memory import anonymous_memory
from omni_convert.convert.execution.tile import Tile, sampled_rows, tiles_of
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.steps import CopyStep, QuantizeStep, Step, matrix_shape
from omni_convert.convert.workers import Workers, one_thread
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.shards import open_shard
from omni_convert.formats.containers.writer import TensorWriter, bytes_of
from omni_convert.formats.errors import CheckpointError, OutputError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import tile_ranges

__all__ = [
    "Engine",
    "Finished",
    "Progress",
    "Work",
    "check_written",
    "execute_component",
    "name_of",
]

Result = TypeVar("Result")

#: Called with the number of source bytes that were processed since the last call.
Progress = Callable[[int], None]

# The disk reads this much of each weight of the steps that are being prepared.
PREFETCH_BYTES = 64 << 20
MEMORY_SECONDS = 0.1


@dataclass(frozen=True)
class Engine:
    """Carries out a plan: with these threads, this device for arithmetic, and this journal of finished work.

    This engine works on this machine alone; `convert.execution.distributed` has the one for clusters.
    """

    workers: Workers
    device: torch.device
    journal: Records

    def run(self, work: Work) -> Iterator[Finished]:
        """Carries out all steps of a component; yields its tiles in order, with bounded work ahead."""
        ahead = 2 * self.workers.count + 2
        steps = work.plan.steps
        if any(step.format.fits_alone for step in work.plan.quantize_steps):
            for step in steps:  # prepared here: this thread has all of torch's threads, and the workers rest
                yield from self.workers.in_order(_prepare(work, step), ahead)
            return
        prepared = self.workers.in_order((partial(_prepare, work, step) for step in steps), self.workers.count + 1)
        yield from self.workers.in_order((task for tasks in prepared for task in tasks), ahead)

    def each(
        self, function: Callable[[ComponentPlan, str, Engine], Result], plan: ComponentPlan, files: Sequence[str]
    ) -> Iterator[Result]:
        """Results of `function(plan, file, engine)` for each file, in order; `engine` is that of its machine."""
        engine = Engine(self.workers, self.device, EarlierRecords({}))
        return (function(plan, file, engine) for file in files)

    def memory(self) -> int:
        """`RssAnon` of this machine's working processes, bytes."""
        return anonymous_memory()


@dataclass(frozen=True)
class CheckedRows:
    """Rows of a weight, which are refused if they hold NaN or Inf: no scale can represent these."""

    work: Work
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        return matrix_shape(self.work.plan.checkpoint[self.name])

    def read(self, start: int, stop: int) -> Tensor:
        self.work.engine.workers.check()
        checkpoint = self.work.plan.checkpoint
        rows = checkpoint.read_rows(self.name, start, stop).to(self.work.engine.device)
        if rows.numel() and not all(math.isfinite(bound) for bound in torch.aminmax(rows)):  # NaN comes through
            raise CheckpointError(
                f"{checkpoint.path}: {checkpoint.weight_map[self.name]}: tensor '{self.name}': found NaN or Inf in "
                f"rows {start} to {stop - 1}, expected finite weights; repair the source, or keep the layer with "
                "--ignored-layers"
            )
        return rows


@dataclass(frozen=True)
class Work:
    """A component that is being made: its plan, and the writers of its output tensors; some outputs may have none."""

    plan: ComponentPlan
    engine: Engine
    outputs: Mapping[str, TensorWriter]

    def name_of(self, tile: Tile) -> str:
        """The tile's name in the journal."""
        return name_of(self.plan, tile)


def name_of(plan: ComponentPlan, tile: Tile) -> str:
    """The name of a tile in the journal."""
    return f"{plan.name}/{tile.source.name}:{tile.start}"


@dataclass(frozen=True)
class Finished:
    """A tile whose bytes are in the output.

    Attributes:
        parts: CRC-32 of its rows of each output tensor; None if an earlier run made them
    """

    tile: Tile
    record: Record
    parts: Mapping[str, int] | None = None


def execute_component(component: ComponentPlan, folder: Path, engine: Engine, progress: Progress) -> ComponentResult:
    """Writes the shards of one component into `folder`; keeps ranges that the journal lists and the disk still holds.

    Raises:
        CheckpointError: the source is damaged or a weight is not finite.
        OutputError: the output cannot be written, or does not hold what was written.
    """
    peak, looked = 0, 0.0
    done: list[Finished] = []
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(open_shard(folder, file, component.shards, resume=True))
            for file in component.shards.files
        }
        outputs = {spec.name: writers[file] for file, specs in component.shards.files.items() for spec in specs}
        hashing: dict[TensorWriter, Future[None]] = {}
        for finished in engine.run(Work(component, engine, outputs)):
            done.append(finished)
            progress(finished.tile.nbytes)
            component.checkpoint.finished(finished.tile.source.name, finished.tile.nbytes)
            _hash_on({outputs[name] for name in finished.tile.ranges}, hashing, engine.workers)
            if time.monotonic() > looked + MEMORY_SECONDS:
                peak, looked = max(peak, engine.memory()), time.monotonic()
        closing = [engine.workers.submit(writer.close) for writer in writers.values()]
        hashes = {file: engine.workers.submit(writer.sha256) for file, writer in writers.items()}
        sha256 = {file: task.result() for file, task in hashes.items()}
        for task in (*hashing.values(), *closing):
            task.result()
    records: dict[str, list[Record]] = {}
    for finished in done:
        check_written(finished, outputs)
        records.setdefault(finished.tile.source.name, []).append(finished.record)
    return ComponentResult(layer_results(component, records), sha256, max(peak, engine.memory()))


def _hash_on(touched: set[TensorWriter], hashing: dict[TensorWriter, Future[None]], workers: Workers) -> None:
    """Starts hashing the written part of files, while the system still has its bytes in memory."""
    for writer in touched:
        if writer in hashing:
            if not hashing[writer].done():
                continue
            hashing[writer].result()
        hashing[writer] = workers.submit(writer.hash_written)


def _prepare(work: Work, step: Step) -> list[Callable[[], Finished]]:
    """The remaining tasks of a step, one per tile; for a group, this also computes what its members share."""
    tiles = [tile for tile in tiles_of(step) if not work.outputs.keys().isdisjoint(tile.ranges)]
    before = [_record_of_earlier_run(work, tile) for tile in tiles]
    if isinstance(step, CopyStep):
        return _tasks(work, tiles, before, partial(_copy, work, step.dtype))
    fits = {record.fit if record is not None else None for record in before}
    if len(fits) == 1 and None not in fits:
        return _tasks(work, tiles, before, None)
    fit = _fit(work, step)
    usable = [record if record and record.fit == fit.checksum else None for record in before]
    return _tasks(work, tiles, usable, partial(_quantize, work, step, fit))


def _tasks(
    work: Work, tiles: Sequence[Tile], before: Sequence[Record | None], make: Callable[[Tile], Finished] | None
) -> list[Callable[[], Finished]]:
    """A task per tile: it returns the record of an earlier run, whose bytes count as written, or calls `make`."""
    tasks: list[Callable[[], Finished]] = []
    for tile, record in zip(tiles, before, strict=True):
        if record is not None:
            for name, rows in tile.ranges.items():
                work.outputs[name].adopt(name, *rows)
            tasks.append(partial(Finished, tile, record))
        else:
            assert make is not None, "every tile has a record"
            tasks.append(partial(make, tile))
    return tasks


def _record_of_earlier_run(work: Work, tile: Tile) -> Record | None:
    """The journal's record of a tile, if the output still holds the bytes of that record; else None."""
    record = work.engine.journal.get(work.name_of(tile))
    if record is None:
        return None
    work.engine.workers.check()
    parts = [zlib.crc32(work.outputs[name].read_back(name, *rows)) for name, rows in tile.ranges.items()]
    return record if _checksum(parts) == record.checksum else None


def _fit(work: Work, step: QuantizeStep) -> _Fit:
    for weight in step.weights:
        work.plan.checkpoint.prefetch(weight.name, PREFETCH_BYTES)
    rows = [CheckedRows(work, weight.name) for weight in step.weights]
    # Sums over a whole weight end in other bits with other numbers of threads.
    with one_thread() if step.format.fits_alone else nullcontext():
        fitted = step.format.fit(rows, step.inputs)
    constants = {suffix: tensor.to(work.engine.device) for suffix, tensor in step.format.constants(fitted).items()}
    checksum = 0
    for suffix in sorted(constants):
        checksum = zlib.crc32(bytes_of(constants[suffix].cpu()), checksum)
    return _Fit(fitted, constants, checksum)


@dataclass(frozen=True)
class _Fit:
    """The result of `Format.fit` for a group, its constants, and their checksum."""

    fitted: Any
    constants: Mapping[str, Tensor]
    checksum: int


def _quantize(work: Work, step: QuantizeStep, fit: _Fit, tile: Tile) -> Finished:
    fmt, constants = step.format, fit.constants
    rows = CheckedRows(work, tile.source.name).read(tile.start, tile.stop)
    tensors = fmt.quantize_rows(rows, fit.fitted)
    sample, stored = sampled_rows(tile, rows, tensors, fmt)
    error, norm = _squared_errors(fmt, matrix_shape(tile.source), sample, stored, constants)
    everything = {suffix: tensor.cpu() for suffix, tensor in {**tensors, **constants}.items()}
    flaw = fmt.flaw(everything)
    if flaw is not None:
        raise CheckpointError(
            f"{work.plan.checkpoint.path}: tensor '{tile.source.name}': cannot be stored as {fmt.label}: {flaw}; "
            "keep the layer with --ignored-layers"
        )
    stem = tile.source.name.removesuffix("weight")
    spelled = step.spelling(tile.source).encode(everything)
    written = {stem + suffix: tensor for suffix, tensor in spelled.items()} | _biases(work, step, tile, everything)
    return _write(work, tile, written, error, norm, fit.checksum)


def _biases(work: Work, step: QuantizeStep, tile: Tile, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a bias that changes with its weight, without what the shift of the inputs adds to outputs."""
    bias, added = step.biases.get(tile.source.name.removesuffix(WEIGHT)), step.format.shift_product(tensors)
    codec = step.spelling(tile.source).bias
    if bias is None or added is None or codec is None:
        return {}
    rows = work.plan.checkpoint.read_rows(bias.name, tile.start, tile.stop).float() - added
    return {bias.name: codec.encode(rows)}


def _squared_errors(
    fmt: Format, shape: tuple[int, int], rows: Tensor, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> tuple[float, float]:
    """‖W - Ŵ‖² and ‖W‖² of some rows, of which few are in memory in float32 at a time.

    Args:
        shape: of the whole weight
        rows: the original
        tensors: of these rows
        constants: tensors of the whole weight
    """
    layouts = fmt.layout(*shape)
    error = norm = 0.0
    for start, stop in tile_ranges(rows.shape, fmt.row_multiple):
        part = {suffix: tensor[layouts[suffix].entries_of(start, stop)] for suffix, tensor in tensors.items()}
        added, size = _squared_error(rows[start:stop], fmt.dequantize({**part, **constants}))
        error, norm = error + added, norm + size
    return error, norm


def _squared_error(original: Tensor, approximation: Tensor) -> tuple[float, float]:
    """‖W - Ŵ‖² and ‖W‖²."""
    values = original.to(torch.float32, copy=True).flatten(1)
    norm = float(values.square().sum(dtype=torch.float64))
    return float(values.sub_(approximation).square_().sum(dtype=torch.float64)), norm


def _copy(work: Work, dtype: torch.dtype, tile: Tile) -> Finished:
    work.engine.workers.check()
    checkpoint, name = work.plan.checkpoint, tile.source.name
    rows = checkpoint.read(name) if tile.is_whole else checkpoint.read_rows(name, tile.start, tile.stop)
    return _write(work, tile, {name: rows.to(dtype)})


def _write(
    work: Work,
    tile: Tile,
    tensors: Mapping[str, Tensor],
    squared_error: float = 0.0,
    squared_norm: float = 0.0,
    fit: int = 0,
) -> Finished:
    """Writes the output of a tile, and adds a record to the journal."""
    parts = {}
    for name, (first_row, _) in tile.ranges.items():
        tensor, writer = tensors[name], work.outputs.get(name)
        if writer is None:
            pass  # the tensor is in another shard
        elif tensor.dim():
            writer.write_rows(name, first_row, tensor)
        else:
            writer.write(name, tensor)
        parts[name] = zlib.crc32(bytes_of(tensor))
    record = Record(_checksum(list(parts.values())), squared_error, squared_norm, fit)
    work.engine.journal.add(work.name_of(tile), record)
    return Finished(tile, record, parts)


def _checksum(parts: Sequence[int]) -> int:
    """The checksum of a tile: CRC-32 over the CRC-32 of its rows of each output tensor."""
    return zlib.crc32(b"".join(part.to_bytes(4, "little") for part in parts))


def check_written(finished: Finished, outputs: Mapping[str, TensorWriter]) -> None:
    """Compares the output of a tile, whose values were checked, with the bytes that hashing read from the files.

    Raises:
        OutputError: they differ.
    """
    tile = finished.tile
    # The machine that makes another shard compares that shard's bytes.
    found = {name: outputs[name].checksum(name, *rows) for name, rows in tile.ranges.items() if name in outputs}
    if finished.parts is not None:
        is_same = all(finished.parts[name] == checksum for name, checksum in found.items())
    else:
        is_same = _checksum(list(found.values())) == finished.record.checksum
    if not is_same:
        raise OutputError(
            f"{outputs[next(iter(found))].path}: found other bytes than were written of '{tile.source.name}', rows "
            f"{tile.start} to {tile.stop - 1}, expected the same; check the disk and the memory, then go on with "
            "--resume"
        )
