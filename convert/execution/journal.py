"""The journal of a conversion: which ranges of the output are finished, so that a later run need not make them again.

    {"job": {...}}                                                                       recipe, statistics and source
    {"range": "transformer/NAME.weight:256", "checksum": 912837, "error": [0.1, 20.5], "fit": 71}       a finished range
    ...

Append-only. A range is named by its component, source tensor and first row; the checksum is over all the output bytes
made from it: CRC-32 for tiles of tensors, or the SHA-256 of a copied file. After a power cut, a record may be there
without its bytes; this does no harm, since bytes are compared before they are trusted. The job holds everything that
must not change between runs: recipe, statistics, and size, header and time of the sources.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

from omni_convert.formats.errors import CheckpointError, OutputError, RecipeError

__all__ = ["JOURNAL", "EarlierRecords", "Journal", "Record", "Records"]

JOURNAL = "omni_convert.journal"
ENTRY = {"range", "checksum", "error", "fit"}
SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class Record:
    """A finished range.

    Attributes:
        checksum: of its bytes
        squared_error, squared_norm: its part of the layer's error
        fit: checksum of the constants that a fused group shares; ranges with other constants do not match this one
    """

    checksum: int | str
    squared_error: float = 0.0
    squared_norm: float = 0.0
    fit: int = 0


class Records(Protocol):
    """Finished work of earlier runs, to which this run adds its own; usually a `Journal`."""

    def get(self, name: str) -> Record | None:
        """The record of a range that an earlier run finished, or None."""
        ...

    def add(self, name: str, record: Record) -> None:
        """Adds the record of a finished range."""
        ...


@dataclass(frozen=True)
class EarlierRecords:
    """Records for work without a journal: the caller, which gets the results, adds their records."""

    records: Mapping[str, Record]

    def get(self, name: str) -> Record | None:
        return self.records.get(name)

    def add(self, name: str, record: Record) -> None:
        pass


class Journal:
    """The journal of one output, which any thread may read and extend."""

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        """Opens a journal and reads it; an empty one is started.

        Args:
            path: the file
            job: recipe, statistics and source of this run

        Raises:
            RecipeError: the journal is that of another recipe.
            CheckpointError: it is that of another source.
            OutputError: it cannot be read or written.
        """
        self.path = path
        self._records: dict[str, Record] = {}
        self._synced = time.monotonic()
        self._lock = Lock()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _cannot_write(path, error) from None
        try:
            self._begin(job)
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, OSError):
                raise _cannot_write(path, error) from None
            if isinstance(error, ValueError | TypeError):
                raise OutputError(f"{path}: found another kind of journal; use --overwrite to start afresh") from None
            raise

    def _begin(self, job: Mapping[str, Any]) -> None:
        """Reads finished work up to the first line that a kill or a power cut damaged; the rest is done again."""
        entries, length = _read_entries(self.path.read_bytes())
        if entries:
            _check_same_job(self.path, entries[0]["job"], json.loads(json.dumps(job)))
            self._records = {entry["range"]: _record_of(entry) for entry in entries[1:]}
        os.ftruncate(self._descriptor, length)
        self._end = length
        if not entries:
            self._append({"job": job})
            os.fsync(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def get(self, name: str) -> Record | None:
        """The record of a range that an earlier run finished, or None."""
        return self._records.get(name)

    def add(self, name: str, record: Record) -> None:
        """Adds the record of a finished range.

        Raises:
            OutputError: the disk is full or fails.
        """
        errors = [record.squared_error, record.squared_norm]
        try:
            self._append({"range": name, "checksum": record.checksum, "error": errors, "fit": record.fit})
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._synced = time.monotonic()
                os.fsync(self._descriptor)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            written = 0
            try:
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
            except OSError:
                os.ftruncate(self._descriptor, self._end)  # the next line must not be joined to a part of this one
                raise
            self._end += len(line)


def _record_of(entry: Mapping[str, Any]) -> Record:
    squared_error, squared_norm = entry["error"]
    return Record(entry["checksum"], squared_error, squared_norm, entry["fit"])


def _read_entries(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The undamaged entries at the start of a journal, the job first, and their number of bytes."""
    entries: list[dict[str, Any]] = []
    length = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        expected = ENTRY if entries else {"job"}
        if not line.endswith(b"\n") or not isinstance(entry, dict) or entry.keys() != expected:
            break
        entries.append(entry)
        length += len(line)
    return entries, length


def _check_same_job(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to continue the work of another recipe or source."""
    for name in sorted(now.keys() - {"source"}, key=lambda name: (name != "recipe", name)):  # what the user chose first
        if before.get(name) != now[name]:
            raise RecipeError(
                f"{path.parent}: found work of another conversion ({_difference(name, before.get(name), now[name])}); "
                "repeat that one with --resume, or use --overwrite to start afresh"
            )
    old, new = before.get("source", {}), now["source"]
    for file in sorted(old.keys() | new.keys()):
        if old.get(file) != new.get(file):
            raise CheckpointError(
                f"{file}: found another file than when the work in {path.parent} began, expected the same size, "
                "header and time; use --overwrite to start afresh"
            )


def _difference(name: str, before: Any, now: Any) -> str:
    """The entries that differ between two tables, as text."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{name} was {before}, is {now}"
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in differing)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror}); free some space, then go on with --resume, "
        "or name another --output"
    )
