"""A conversion on a Ray cluster: steps go out in batches, records of what was written come back.

The driver creates the output files at their full size. A batch runs as a task on some machine, which opens source and
output by their paths, carries out its steps with its own threads as if they were all there is, writes each row at its
final place and puts it on the disk. The driver alone has the journal, the hashes and the rename. A batch that is run
again writes the same bytes at the same places.
"""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from omni_convert.convert.cluster import Cluster, Slots, check_versions, versions
from omni_convert.convert.device import resolve_device
from omni_convert.convert.execute import MEMORY_SECONDS, Engine, Finished, Work
from omni_convert.convert.journal import Record
from omni_convert.convert.memory import anonymous_memory
from omni_convert.convert.plan import ComponentPlan, CopyStep, QuantizeStep
from omni_convert.convert.tile import tiles_of
from omni_convert.convert.workers import Workers
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.safetensors_writer import SafetensorsWriter

__all__ = ["RayEngine"]

# Each slot gets several batches, so that none waits long for the last; small ones would be mostly overhead.
BATCHES_A_SLOT = 8
MIN_BATCH_BYTES, MAX_BATCH_BYTES = 8 << 20, 1 << 30
# What Ray is told that a batch takes: the libraries, the tiles of each thread, and for rounding matrices [in, in].
BASE_MEMORY, THREAD_MEMORY, MATRICES = 384 << 20, 96 << 20, 6

Steps = tuple[QuantizeStep | CopyStep, ...]


@dataclass(frozen=True)
class _Shared:
    """What all batches of a component have in common; its plan has no steps."""

    plan: ComponentPlan
    folder: Path
    device: str
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class _Batch:
    """Steps, and what earlier runs noted about their tiles."""

    steps: Steps
    earlier: Mapping[str, Record]


@dataclass(frozen=True)
class _Done:
    """The record of each tile of a batch, in order, and where they were made in how much memory."""

    records: list[Record]
    machine: str
    process: int
    memory: int


@dataclass(frozen=True)
class _Earlier:
    """Records for a process that has no journal: what it adds goes back as its result."""

    records: Mapping[str, Record]

    def get(self, name: str) -> Record | None:
        return self.records.get(name)

    def add(self, name: str, record: Record) -> None:
        pass


@dataclass(frozen=True)
class RayEngine(Engine):
    """Carries out steps on a cluster; its own threads only copy and hash.

    Attributes:
        cluster: connected
        slots: how the cluster takes batches
    """

    cluster: Cluster
    slots: Slots
    _memory: dict[tuple[str, int], int] = field(default_factory=dict)

    def run(self, work: Work) -> Iterator[Finished]:
        """Carries out all steps of a component; its tiles, in order, with bounded work ahead."""
        folder = next(iter(work.outputs.values())).path.parent
        plan = replace(work.plan, steps=(), kept=(), config={})
        shared = _Shared(plan, folder.absolute(), str(self.device), self.slots.cores, versions())
        reference = self.cluster.share(pickle.dumps(shared))
        batches = self._batches(work.plan)
        calls = ((reference, pickle.dumps(_Batch(steps, self._earlier(work, steps)))) for steps in batches)
        memory = _memory_of_batch(work.plan, self.slots.cores)
        results = self.cluster.in_order(run_batch, calls, self.slots, memory)
        for steps, done in zip(batches, results, strict=True):
            self._memory[done.machine, done.process] = done.memory
            yield from self._take_in(work, steps, done.records)

    def memory(self) -> int:
        """The largest sum of `RssAnon` over the processes of one machine, bytes."""
        by_machine: dict[str, int] = {platform.node(): anonymous_memory()}
        for (machine, _), memory in self._memory.items():
            by_machine[machine] = by_machine.get(machine, 0) + memory
        return max(by_machine.values())

    def _batches(self, plan: ComponentPlan) -> list[Steps]:
        share = plan.bytes_before // (BATCHES_A_SLOT * self.slots.count)
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
        """Notes what a batch has written."""
        tiles = [tile for step in steps for tile in tiles_of(step)]
        for tile, record in zip(tiles, records, strict=True):
            for name, rows in tile.ranges.items():
                work.outputs[name].adopt(name, *rows)
            if self.journal.get(work.name_of(tile)) != record:
                self.journal.add(work.name_of(tile), record)
            yield Finished(tile, record)


def _memory_of_batch(plan: ComponentPlan, threads: int) -> int:
    widest = max(
        (weight.shape[1] for step in plan.quantize_steps if step.format.fits_alone for weight in step.weights),
        default=0,
    )
    return BASE_MEMORY + threads * THREAD_MEMORY + MATRICES * widest * widest * torch.float32.itemsize


def run_batch(shared: bytes, batch: bytes) -> _Done | OmniConvertError:
    """Carries out a batch on this machine; the task that Ray runs."""
    try:
        return _run_batch(_open_shared(shared), batch)
    except OmniConvertError as error:
        return error


@lru_cache(maxsize=1)
def _open_shared(content: bytes) -> _Shared:
    """Opens the files of the source; once for many batches."""
    shared: _Shared = pickle.loads(content)
    check_versions(shared.versions, platform.node())
    return shared


def _run_batch(shared: _Shared, content: bytes) -> _Done:
    batch: _Batch = pickle.loads(content)
    torch.set_num_threads(shared.threads)
    names = {spec.name for step in batch.steps for spec in step.outputs()}
    writers = {
        file: SafetensorsWriter(shared.folder / file, specs, join=True)
        for file, specs in shared.plan.shards.files.items()
        if not names.isdisjoint(spec.name for spec in specs)
    }
    files = shared.plan.shards.files.items()
    outputs = {spec.name: writers[file] for file, specs in files if file in writers for spec in specs}
    records = []
    memory, looked = 0, 0.0
    with Workers(shared.threads) as workers:
        engine = Engine(workers, resolve_device(shared.device), _Earlier(batch.earlier))
        for finished in engine.run(Work(replace(shared.plan, steps=batch.steps), engine, outputs)):
            records.append(finished.record)
            if time.monotonic() > looked + MEMORY_SECONDS:
                memory, looked = max(memory, anonymous_memory()), time.monotonic()
    for writer in writers.values():
        writer.detach()
    return _Done(records, platform.node(), os.getpid(), memory)
