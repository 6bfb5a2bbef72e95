"""A conversion on a Ray cluster: steps are sent out in batches, and records of the written tiles come back.

The driver creates the output files at their full size. A batch runs as a task on some machine, which opens source and
output by their paths, carries out its steps with its own threads, writes each row at its final place and syncs it to
the disk. The driver alone keeps the journal, hashes files and renames the folder. A batch that runs again writes the
same bytes at the same places.
"""

from __future__ import annotations

import os
import pickle
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from omni_convert.convert.cluster import Cluster, Slots, check_versions, versions
from omni_convert.convert.device import resolve_device
from omni_convert.convert.execution.journal import EarlierRecords, Record
from omni_convert.convert.execution.local import Engine, Finished, Work
from omni_convert.convert.execution.memory import PeakMemory, anonymous_memory
from omni_convert.convert.execution.tile import tiles_of
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.steps import Step
from omni_convert.convert.workers import Workers
from omni_convert.formats.containers.shards import open_shard
from omni_convert.formats.errors import OmniConvertError

__all__ = ["RayEngine"]

# Each slot gets several batches, so that none waits long for the last one; very small batches would be mostly overhead.
BATCHES_A_SLOT = 8
MIN_BATCH_BYTES, MAX_BATCH_BYTES = 8 << 20, 1 << 30
# The memory that a batch reserves in Ray: libraries, the tiles of each thread, and matrices [in, in] for rounding.
BASE_MEMORY, THREAD_MEMORY, MATRICES = 384 << 20, 96 << 20, 6

Result = TypeVar("Result")
Steps = tuple[Step, ...]


@dataclass(frozen=True)
class _Shared:
    """The part that all batches of a component share; its plan has no steps."""

    plan: ComponentPlan
    folder: Path
    device: str
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class _Batch:
    """Steps to carry out, and the records that earlier runs left of their tiles."""

    steps: Steps
    earlier: Mapping[str, Record]

    def run(self, shared: _Shared, engine: Engine) -> list[Record]:
        """The record of each tile, in order."""
        names = {spec.name for step in self.steps for spec in step.outputs()}
        files = {
            file: specs
            for file, specs in shared.plan.shards.files.items()
            if not names.isdisjoint(spec.name for spec in specs)
        }
        writers = {file: open_shard(shared.folder, file, shared.plan.shards, join=True) for file in files}
        outputs = {spec.name: writers[file] for file, specs in files.items() for spec in specs}
        engine = replace(engine, journal=EarlierRecords(self.earlier))
        work = Work(replace(shared.plan, steps=self.steps), engine, outputs)
        records = [finished.record for finished in engine.run(work)]
        for writer in writers.values():
            writer.detach()
        return records


@dataclass(frozen=True)
class _Call:
    """A function to call for a file of the component."""

    function: Callable[[ComponentPlan, str, Engine], Any]
    file: str

    def run(self, shared: _Shared, engine: Engine) -> Any:
        """The return value of the function."""
        return self.function(shared.plan, self.file, engine)


@dataclass(frozen=True)
class _Done:
    """The result of a task, the process that ran it, and the memory that it took."""

    result: Any
    machine: str
    process: int
    memory: int


@dataclass(frozen=True)
class RayEngine(Engine):
    """Carries out steps on a cluster; its own threads only copy and hash.

    Attributes:
        cluster: the connection
        slots: number and size of the places that run batches
    """

    cluster: Cluster
    slots: Slots
    _memory: dict[tuple[str, int], int] = field(default_factory=dict)

    def run(self, work: Work) -> Iterator[Finished]:
        """Carries out all steps of a component; yields its tiles in order, with bounded work ahead."""
        folder = next(iter(work.outputs.values())).path.parent.absolute()
        plan = replace(work.plan, steps=(), kept=(), config={})
        batches = self._batches(work.plan)
        tasks = (_Batch(steps, self._earlier(work, steps)) for steps in batches)
        for steps, records in zip(batches, self._run_tasks(work.plan, plan, folder, tasks), strict=True):
            yield from self._take_in(work, steps, records)

    def each(
        self, function: Callable[[ComponentPlan, str, Engine], Result], plan: ComponentPlan, files: Sequence[str]
    ) -> Iterator[Result]:
        """Results of `function(plan, file, engine)` for each file, in order; `engine` is that of its machine."""
        tasks = (_Call(function, file) for file in files)
        return self._run_tasks(plan, replace(plan, kept=(), config={}), Path(), tasks)

    def _run_tasks(
        self, plan: ComponentPlan, shared_plan: ComponentPlan, folder: Path, tasks: Iterable[_Batch | _Call]
    ) -> Iterator[Any]:
        shared = _Shared(shared_plan, folder, str(self.device), self.slots.cores, versions())
        reference = self.cluster.share(pickle.dumps(shared))
        calls = ((reference, pickle.dumps(task)) for task in tasks)
        memory = _memory_of_task(plan, self.slots.cores)
        with closing(self.cluster.in_order(run_task, calls, self.slots, memory)) as results:
            for done in results:
                place = (done.machine, done.process)
                self._memory[place] = max(self._memory.get(place, 0), done.memory)
                yield done.result

    def memory(self) -> int:
        """The largest sum of `RssAnon` over the processes of one machine, bytes."""
        by_machine: dict[str, int] = {platform.node(): anonymous_memory()}
        for (machine, _), memory in self._memory.items():
            by_machine[machine] = by_machine.get(machine, 0) + memory
        return max(by_machine.values())

    def _batches(self, plan: ComponentPlan) -> list[Steps]:
        share = plan.bytes_to_do // (BATCHES_A_SLOT * self.slots.count)
        limit = max(MIN_BATCH_BYTES, min(MAX_BATCH_BYTES, share))
        batches: list[Steps] = []
        size = limit
        for step in plan.steps:
            if size >= limit:
                batches.append(())
                size = 0
            batches[-1] += (step,)
            size += sum(spec.nbytes for spec in step.outputs())
        return batches

    def _earlier(self, work: Work, steps: Steps) -> dict[str, Record]:
        names = [work.name_of(tile) for step in steps for tile in tiles_of(step)]
        return {name: record for name in names if (record := self.journal.get(name)) is not None}

    def _take_in(self, work: Work, steps: Steps, records: Sequence[Record]) -> Iterator[Finished]:
        """Adds the records of a batch to the journal."""
        tiles = [tile for step in steps for tile in tiles_of(step)]
        for tile, record in zip(tiles, records, strict=True):
            for name, rows in tile.ranges.items():
                work.outputs[name].adopt(name, *rows)
            if self.journal.get(work.name_of(tile)) != record:
                self.journal.add(work.name_of(tile), record)
            yield Finished(tile, record)


def _memory_of_task(plan: ComponentPlan, threads: int) -> int:
    widest = max(
        (weight.shape[1] for step in plan.quantize_steps if step.format.fits_alone for weight in step.weights),
        default=0,
    )
    return BASE_MEMORY + threads * THREAD_MEMORY + MATRICES * widest * widest * torch.float32.itemsize


def run_task(shared: bytes, task: bytes) -> _Done | OmniConvertError:
    """Carries out a task on this machine; Ray calls this function."""
    try:
        return _run_task(_open_shared(shared), pickle.loads(task))
    except OmniConvertError as error:
        return error


@lru_cache(maxsize=1)
def _open_shared(content: bytes) -> _Shared:
    """Opens the files of the source, once for many tasks."""
    shared: _Shared = pickle.loads(content)
    check_versions(shared.versions, platform.node())
    return shared


def _run_task(shared: _Shared, task: _Batch | _Call) -> _Done:
    torch.set_num_threads(shared.threads)
    with PeakMemory() as peak, Workers(shared.threads) as workers:
        result = task.run(shared, Engine(workers, resolve_device(shared.device), EarlierRecords({})))
    return _Done(result, platform.node(), os.getpid(), peak.size)
