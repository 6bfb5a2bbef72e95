"""Writes a component to a URL: each shard is made on the disk of some machine, uploaded, and removed.

Scales of a fused group that lies in two shards are computed for each. The journal names the shards that have arrived.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from omni_convert.convert.execution.component_result import ComponentResult, layer_results
from omni_convert.convert.execution.journal import Record
from omni_convert.convert.execution.local import Engine, Progress, Work, check_written, name_of
from omni_convert.convert.execution.tile import Tile, tiles_of
from omni_convert.convert.output.remote_folder import RemoteFolder
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.formats.containers.shards import open_shard
from omni_convert.formats.errors import OutputError

__all__ = ["upload_component"]


@dataclass(frozen=True)
class _Sent:
    """A shard that has arrived: its SHA-256, and the records of the tiles that it contains parts of, by name."""

    sha256: str
    records: dict[str, Record]


def upload_component(
    remote: RemoteFolder, component: ComponentPlan, engine: Engine, progress: Progress
) -> ComponentResult:
    """Makes and uploads the shards of one component, except those that an earlier run uploaded and that are unchanged.

    Raises:
        CheckpointError: the source is damaged or a weight is not finite.
        OutputError: a shard cannot be made or sent.
    """
    tiles = {name_of(component, tile): tile for step in component.steps for tile in tiles_of(step)}
    records = {name: record for name in tiles if (record := engine.journal.get(name)) is not None}
    for name in records:
        _finish(component, tiles[name], progress)
    sha256 = _arrived(component, remote, engine)
    missing = [file for file in component.shards.files if file not in sha256]
    for file, sent in zip(missing, engine.each(partial(_send_shard, remote), component, missing), strict=True):
        for name, record in sent.records.items():
            if name not in records:
                _finish(component, tiles[name], progress)
            if records.get(name) != record:
                engine.journal.add(name, record)
                records[name] = record
        engine.journal.add(f"{component.name}/{file}", Record(sent.sha256))
        sha256[file] = sent.sha256
    _check_fits(component, records)
    by_weight: dict[str, list[Record]] = {}
    for name, tile in tiles.items():
        by_weight.setdefault(tile.source.name, []).append(records[name])
    return ComponentResult(layer_results(component, by_weight), sha256, engine.memory())


def _check_fits(component: ComponentPlan, records: Mapping[str, Record]) -> None:
    """Checks that machines agree on the scales of a fused group that lies in two shards.

    Raises:
        OutputError: they computed different scales.
    """
    for step in component.quantize_steps:
        if len({records[name_of(component, tile)].fit for tile in tiles_of(step)}) > 1:
            raise OutputError(
                f"{step.group.runtime_name}: found shards made with different scales for this fused group, expected "
                "equal ones from every machine and run; use machines of one kind, with --overwrite"
            )


def _finish(component: ComponentPlan, tile: Tile, progress: Progress) -> None:
    progress(tile.nbytes)
    component.checkpoint.finished(tile.source.name, tile.nbytes)


def _arrived(component: ComponentPlan, remote: RemoteFolder, engine: Engine) -> dict[str, str]:
    """SHA-256 of the shards that an earlier run uploaded, if they are unchanged."""
    sha256 = {}
    for file in component.shards.files:
        record = engine.journal.get(f"{component.name}/{file}")
        if record is not None and remote.sha256(_path(component, file)) == record.checksum:
            sha256[file] = str(record.checksum)
    return sha256


def _send_shard(remote: RemoteFolder, component: ComponentPlan, file: str, engine: Engine) -> _Sent:
    """Makes a shard with the threads of this machine, and uploads it."""
    specs = component.shards.files[file]
    names = {spec.name for spec in specs}
    steps = tuple(step for step in component.steps if not names.isdisjoint(spec.name for spec in step.outputs()))
    with tempfile.TemporaryDirectory(prefix="omni-convert-") as folder:
        path = Path(folder) / file
        with open_shard(Path(folder), file, component.shards) as writer:
            outputs = dict.fromkeys(names, writer)
            work = Work(replace(component, steps=steps), engine, outputs)
            done = list(engine.run(work))
            sha256 = writer.sha256()
        for finished in done:
            check_written(finished, outputs)
        records = {work.name_of(finished.tile): finished.record for finished in done}
        remote.send(path, _path(component, file))
    return _Sent(sha256, records)


def _path(component: ComponentPlan, file: str) -> str:
    return (Path(component.name) / file).as_posix()
