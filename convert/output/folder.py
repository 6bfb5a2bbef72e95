"""The output folder: it appears whole or not at all.

All work is done in OUT.partial, which is renamed to OUT if nothing was raised. A killed run leaves OUT.partial, and the
old OUT if there was one. The journal in OUT.partial also keeps a second run out: it is locked while a run works there,
and removed only after the rename.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omni_convert.convert.execution.journal import JOURNAL
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.formats.errors import OutputError

__all__ = [
    "check_output",
    "clear_folder",
    "is_finished",
    "locked_folder",
    "partial_folder",
    "partial_path",
    "sync_folder",
    "tidy",
    "write_text",
]


def check_output(output: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuses an output folder that already holds something, before any work is done.

    Raises:
        OutputError: OUT or OUT.partial is in the way. With `overwrite`, output of this tool may be there, which is then
            replaced. With `resume`, a finished OUT or the work in OUT.partial may be there.
    """
    partial = partial_path(output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: found a file, expected a folder or nothing; name another --output")
    _check_ours(partial, JOURNAL)
    _check_ours(_previous_path(output), MANIFEST)
    if output.is_dir() and any(output.iterdir()):
        if not overwrite and not (resume and is_finished(output)):
            more = " --resume" if resume else ""
            raise OutputError(
                f"{output}: found a folder that is not empty; use --overwrite{more}, or name another --output"
            )
        _check_ours(output, MANIFEST)
    if partial.exists() and not overwrite and not resume:
        with locked_folder(partial):
            raise OutputError(
                f"{partial}: an unfinished run left its work; use --resume to go on, or --overwrite to start afresh"
            )


def _check_ours(folder: Path, mark: str) -> None:
    """Refuses to touch a folder that is not empty and lacks the file by which outputs of this tool are recognised."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise OutputError(
            f"{folder}: found a folder without {mark}, so not made by omni-convert, which would delete it; "
            "move it, or name another --output"
        )


def partial_path(output: Path) -> Path:
    """OUT.partial."""
    return output.with_name(output.name + ".partial")


def _previous_path(output: Path) -> Path:
    return output.with_name(output.name + ".previous")


def is_finished(output: Path) -> bool:
    """Whether a conversion was finished here, and no later one has begun."""
    return (output / MANIFEST).is_file() and not partial_path(output).exists()


@contextmanager
def partial_folder(output: Path, *, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """Yields OUT.partial to work in; renames it to OUT on success, and leaves it as it is on failure.

    Args:
        output: OUT
        overwrite: replace an earlier OUT, and an earlier OUT.partial unless it is resumed
        resume: keep the work of an earlier run in OUT.partial

    Raises:
        OutputError: the folder is in the way or in use, or cannot be created or renamed.
    """
    check_output(output, overwrite=overwrite, resume=resume)
    partial = partial_path(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be created ({error.strerror}); name another --output") from None
    with locked_folder(partial):
        if not resume:
            clear_folder(partial)
        yield partial
        try:
            sync_tree(partial)
            _replace(partial, output)
        except OSError as error:
            raise OutputError(
                f"{output}: cannot be put in place ({error.strerror}); the work is in {partial}, go on with --resume"
            ) from None


@contextmanager
def locked_folder(partial: Path) -> Iterator[None]:
    """Holds the lock on the work in a folder.

    Raises:
        OutputError: another process holds it.
    """
    path = partial / JOURNAL
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be written ({error.strerror}); name another --output") from None
    try:
        if not _lock(lock) or not path.exists() or path.stat().st_ino != os.fstat(lock).st_ino:
            raise OutputError(f"{partial}: found another omni-convert at work here; wait for it to end")
        yield
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    """Takes the lock; False if another process holds it. File systems without locks let every process in."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def clear_folder(partial: Path) -> None:
    """Empties the folder; the journal, which is locked, is kept and truncated."""
    try:
        for path in partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != JOURNAL:
                path.unlink()
        os.truncate(partial / JOURNAL, 0)
    except OSError as error:
        raise OutputError(f"{partial}: cannot be emptied ({error.strerror}); remove it yourself") from None


def _replace(partial: Path, output: Path) -> None:
    """Renames `partial` to `output`; an older output is first moved to OUT.previous, and removed last.

    After a kill between the two renames, --resume puts the complete OUT.partial in place.
    """
    previous = _previous_path(output)
    if output.exists():
        if previous.exists():
            shutil.rmtree(previous)
        output.rename(previous)
    partial.rename(output)
    sync_folder(output.parent)
    tidy(output)


def tidy(output: Path) -> None:
    """Removes the journal and OUT.previous, which are needed until the output is in place; a kill may leave them.

    Raises:
        OSError: they cannot be removed.
    """
    (output / JOURNAL).unlink(missing_ok=True)
    sync_folder(output)
    previous = _previous_path(output)
    if previous.exists():
        shutil.rmtree(previous)


def sync_tree(folder: Path) -> None:
    """Flushes a folder's files and names to the disk, so that they survive a power failure."""
    for path in sorted(folder.rglob("*")):
        sync_folder(path)  # a file is synced by the same call
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Flushes a folder or a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a small file in UTF-8.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); free some space, then --resume") from None
