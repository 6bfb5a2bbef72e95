"""The output folder: it appears whole or not at all.

Work goes to OUT.partial, which is renamed to OUT when nothing was raised. A killed run leaves OUT.partial, and the old
OUT if there was one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omni_convert.formats.errors import OutputError

__all__ = ["MANIFEST", "check_output", "partial_folder", "sync_folder"]

MANIFEST = "omni_convert.json"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuses an output folder that already holds something, before any work is done.

    Raises:
        OutputError: OUT or OUT.partial is in the way. With `overwrite` only what this tool wrote is replaced.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: found a file, expected a folder or nothing; name another --output")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise OutputError(f"{output}: found a folder that is not empty; use --overwrite, or name another --output")
        if not (output / MANIFEST).is_file():
            raise OutputError(
                f"{output}: found a folder without {MANIFEST}, so not an output of omni-convert; "
                "--overwrite does not delete it, remove it yourself"
            )
    if partial_path(output).exists() and not overwrite:
        raise OutputError(f"{partial_path(output)}: an interrupted run left its work; use --overwrite to start afresh")


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


@contextmanager
def partial_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A fresh OUT.partial to work in, renamed to OUT on success and left as it is on any failure.

    Raises:
        OutputError: the folder is in the way, or cannot be created or renamed.
    """
    check_output(output, overwrite=overwrite)
    partial = partial_path(output)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be created ({error.strerror}); name another --output") from None
    yield partial
    sync_tree(partial)
    _replace(partial, output)


def _replace(partial: Path, output: Path) -> None:
    """Renames `partial` to `output`. An older output is set aside first and removed last: one always exists."""
    previous = output.with_name(output.name + ".previous")
    try:
        if previous.exists():
            shutil.rmtree(previous)
        if output.exists():
            output.rename(previous)
        partial.rename(output)
        sync_folder(output.parent)
        if previous.exists():
            shutil.rmtree(previous)
    except OSError as error:
        raise OutputError(f"{output}: cannot be put in place ({error.strerror}); the work is in {partial}") from None


def sync_tree(folder: Path) -> None:
    """Makes a folder's files and names survive a power cut."""
    for path in sorted(folder.rglob("*")):
        sync_folder(path)  # a file is synced by the same call
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
