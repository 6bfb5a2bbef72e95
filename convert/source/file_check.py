"""Compares the files of an output with the hashes in its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from threading import Event

from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.weight_files import checked_path
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.finding import Finding, Severity

__all__ = ["check_files", "refuse_changed_files"]

BLOCK = 4 << 20
# Files that people edit on purpose before they convert again.
CONFIGS = (".json",)
# Files that people may edit, and no runtime reads.
TEXTS = (".md",)


def check_files(folder: Path, stop: Event, places: tuple[str, ...] = ("",)) -> list[tuple[str, Finding]]:
    """Findings about files of the manifest that are missing or changed; none if there is no manifest.

    Args:
        folder: an output
        stop: set when the result is no longer needed
        places: beginnings of the paths that are checked

    Returns:
        paths inside the folder, and findings
    """
    if not (folder / MANIFEST).is_file():
        return []
    try:
        recorded = read_json(folder / MANIFEST).get("files")
    except CheckpointError as error:
        return [_damaged(_plain(error, folder))]
    if not isinstance(recorded, dict) or not all(isinstance(sha256, str) for sha256 in recorded.values()):
        return [_damaged("found no SHA-256 of every file, expected them under 'files'")]
    return [
        (name, finding)
        for name, sha256 in sorted(recorded.items())
        if name.startswith(places)
        for finding in _check(folder, name, sha256, stop)
    ]


def refuse_changed_files(path: Path, components: Collection[str]) -> None:
    """Refuses an output of ours whose weights are not what its manifest records.

    Args:
        path: a pipeline, a component or a file
        components: the folders of the pipeline that are read, or "" for the whole

    Raises:
        CheckpointError: a file is missing or has other bytes; nothing is said where there is no manifest.
    """
    folder = path if path.is_dir() else path.parent
    for root, below in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if not (root / MANIFEST).is_file():
            continue
        wanted = [f"{below}{name}/".removeprefix("/") if name else below for name in components]
        for name, finding in check_files(root, Event(), tuple(wanted)):
            if finding.severity == "error" and not name.endswith(CONFIGS):
                raise CheckpointError(f"{root / name}: {finding.what}; {finding.remedy}, or use --force")
        return


def _damaged(what: str) -> tuple[str, Finding]:
    return MANIFEST, Finding("error", "damaged-file", MANIFEST, what, "", "convert again")


def _check(folder: Path, name: str, expected: str, stop: Event) -> Iterator[Finding]:
    severity: Severity = "warning" if PurePosixPath(name).suffix in TEXTS else "error"
    hurts = "whoever takes it for what was converted" if severity == "error" else ""
    remedy = f"copy or download it again; if the change is meant, delete its line from {MANIFEST}"
    try:
        found = _sha256(_path(folder, name), stop)
    except (CheckpointError, OSError) as error:
        reason = error.strerror or "" if isinstance(error, OSError) else _plain(error, folder)
        yield Finding(severity, "changed-file", name, f"found none that can be read: {reason}", hurts, remedy)
        return
    if found is not None and found != expected.lower():
        what = f"found SHA-256 {found[:16]}..., expected {expected[:16]}... as {MANIFEST} says"
        yield Finding(severity, "changed-file", name, what, hurts, remedy)


def _path(folder: Path, name: str) -> Path:
    """Raises CheckpointError if the file is missing or outside of the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.name:
        raise CheckpointError("the manifest names a file outside of the folder")
    return checked_path(folder / pure.parent, pure.name)


def _sha256(path: Path, stop: Event) -> str | None:
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            if stop.is_set():
                return None
            digest.update(block[:count])
    return digest.hexdigest()


def _plain(error: CheckpointError, folder: Path) -> str:
    """The error's message without the folder."""
    return str(error).replace(f"{folder}/", "")
