"""Copies the files that a conversion does not change, and hashes them on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from omni_convert.convert.execution.journal import Record
from omni_convert.convert.execution.local import Engine
from omni_convert.convert.source.file_hash import file_sha256
from omni_convert.convert.source.hub_files import HubFiles
from omni_convert.formats.errors import CheckpointError, OutputError

__all__ = ["copy_file", "take_files"]

BLOCK = 1 << 20


def copy_file(engine: Engine, name: str, source: Path, target: Path) -> str:
    """Copies a file, unless an earlier run did; returns its SHA-256.

    Args:
        engine: its journal records the copy
        name: path of the file inside the output
        source: the file to copy
        target: path of the copy

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the copy cannot be written.
    """
    return _copied_before(engine, name, target) or _copy_anew(engine, name, source, target)


def _copied_before(engine: Engine, name: str, target: Path) -> str | None:
    """SHA-256 of a copy that an earlier run made, if the copy is unchanged; else None."""
    before = engine.journal.get(name)
    if before is None or not target.is_file():
        return None
    sha256 = file_sha256(target)
    return sha256 if sha256 == before.checksum else None


def _copy_anew(engine: Engine, name: str, source: Path, target: Path) -> str:
    try:
        file = source.open("rb", buffering=0)
    except OSError as error:
        raise _cannot_read(source, error) from None
    with file:
        try:
            sha256 = _copy(engine, source, file.fileno(), target)
        except OSError as error:
            raise OutputError(
                f"{target}: cannot be written ({error.strerror}); free some space, then --resume"
            ) from None
    engine.journal.add(name, Record(sha256))
    return sha256


def _cannot_read(source: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{source}: cannot be read ({error.strerror}); repair or download it again, then --resume")


def _copy(engine: Engine, source: Path, descriptor: int, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    with target.open("wb", buffering=0) as output:
        while count := _read(source, descriptor, block):
            engine.workers.check()
            digest.update(block[:count])
            written = 0
            while written < count:
                written += os.write(output.fileno(), block[written:count])
    return digest.hexdigest()


def _read(source: Path, descriptor: int, block: memoryview) -> int:
    try:
        return os.readv(descriptor, [block])
    except OSError as error:
        raise _cannot_read(source, error) from None


def take_files(engine: Engine, hub_files: HubFiles, names: Sequence[str], folder: Path) -> dict[str, str]:
    """Copies files from the Hub one after the other, as `copy_file` does; returns their SHA-256 by name."""
    return {
        name: _copied_before(engine, name, folder / name) or _take(engine, hub_files, name, folder / name)
        for name in names
    }


def _take(engine: Engine, hub_files: HubFiles, name: str, target: Path) -> str:
    sha256 = _copy_anew(engine, name, hub_files.path(name), target)
    hub_files.release(name)
    return sha256
