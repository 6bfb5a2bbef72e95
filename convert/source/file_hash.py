"""SHA-256 of whole files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from omni_convert.convert.workers import Workers
from omni_convert.formats.containers.reader import TensorFile

__all__ = ["SourceHashes", "file_sha256"]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SourceHashes:
    """SHA-256 of each file of weights of the source, computed when its last tensor was read, before it is removed."""

    def __init__(self, files: Sequence[TensorFile], workers: Workers) -> None:
        """Starts to watch files, of which nothing was read yet; threads hash them later."""
        self._files = files
        self._workers = workers
        self._hashes: dict[Path, Future[str]] = {}
        for file in self._files:
            file.at_end(self._start)

    def results(self) -> dict[Path, str]:
        """Path → SHA-256, also of files with tensors that were never read."""
        for file in self._files:
            if file.path not in self._hashes:
                self._start(file)
        return {path: task.result() for path, task in self._hashes.items()}

    def _start(self, file: TensorFile) -> None:
        self._hashes[file.path] = self._workers.submit(_file_hash, file)


def _file_hash(file: TensorFile) -> str:
    sha256 = file_sha256(file.on_disk())
    file.release()
    return sha256
