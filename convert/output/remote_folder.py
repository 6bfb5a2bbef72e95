"""An output at a URL that `fsspec` can open: `s3://bucket/out`, `gs://`, `file://`, ...

Files there can be neither renamed nor written in pieces. So shards are finished on a local disk and uploaded whole,
followed by the other files. The files by which readers find the rest come last: configs and indexes of the components,
model_index.json, and the manifest. An interrupted upload is therefore never mistaken for a model. The journal and small
files wait in a folder NAME.upload of the current directory, which is removed when all files have arrived.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omni_convert.convert.execution.journal import JOURNAL
from omni_convert.convert.output.folder import clear_folder, locked_folder
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import OutputError, RecipeError

__all__ = ["RemoteFolder", "check_remote", "finished_manifest", "published_folder"]

Result = TypeVar("Result")

READ_BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL; any process may open it."""

    url: str

    def __str__(self) -> str:
        filesystem, path = self._open()
        return str(filesystem.unstrip_protocol(path))  # without passwords that the URL may hold

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def staging(self) -> Path:
        """The local folder for the journal, and for the files that are uploaded last."""
        return Path(f"{self.name}.upload")

    def send(self, file: Path, name: str) -> None:
        """Uploads a file, which then exists as a whole or not at all.

        Raises:
            OutputError: the file did not arrive.
        """

        def put(filesystem: Any, path: str) -> None:
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(file), path)
            if (size := filesystem.size(path)) != file.stat().st_size:
                raise OSError(f"found {size} bytes, expected {file.stat().st_size}")

        self._do(name, put)

    def sha256(self, name: str) -> str | None:
        """SHA-256 of a file, which is read completely; None if there is no such file.

        Raises:
            OutputError: the file cannot be read.
        """

        def hash_of(filesystem: Any, path: str) -> str | None:
            if not filesystem.exists(path):
                return None
            digest = hashlib.sha256()
            with filesystem.open(path, "rb") as file:
                while block := file.read(READ_BLOCK):
                    digest.update(block)
            return digest.hexdigest()

        return self._do(name, hash_of)

    def fetch(self, name: str, file: Path) -> bool:
        """Downloads a file; False if there is no such file.

        Raises:
            OutputError: it cannot be read.
        """

        def get(filesystem: Any, path: str) -> bool:
            if not filesystem.exists(path):
                return False
            filesystem.get_file(path, str(file))
            return True

        return self._do(name, get)

    def remove(self, name: str) -> None:
        """Removes a file if it exists.

        Raises:
            OutputError: it cannot be removed.
        """
        self._do(name, lambda filesystem, path: filesystem.rm_file(path) if filesystem.exists(path) else None)

    def is_empty(self) -> bool:
        """Whether the folder has no files.

        Raises:
            OutputError: the URL does not answer.
        """
        return self._do("", lambda filesystem, path: not (filesystem.exists(path) and filesystem.find(path)))

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            filesystem, path = url_to_fs(self.url.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise RecipeError(f"--output: found a URL that fsspec cannot open ({_first_line(error)})") from None
        return filesystem, path

    def _do(self, name: str, action: Callable[[Any, str], Result]) -> Result:
        filesystem, path = self._open()
        try:
            return action(filesystem, f"{path}/{name}".rstrip("/"))
        except Exception as error:  # noqa: BLE001  # every file system raises its own
            raise OutputError(
                f"{self}/{name}: cannot be read or written ({type(error).__name__}: {_first_line(error)}); "
                "see to it, then go on with --resume"
            ) from None


def check_remote(remote: RemoteFolder, *, overwrite: bool, resume: bool) -> None:
    """Checks before any work that nothing is at the URL yet.

    Raises:
        OutputError: something is there, or an unfinished run left its work.
        RecipeError: no library for this kind of URL is installed.
    """
    if overwrite or resume:
        return
    if not remote.is_empty():
        raise OutputError(
            f"{remote}: found something there; use --resume to continue an unfinished run, --overwrite to replace an "
            "earlier output, or name another --output"
        )
    if remote.staging.exists():
        raise OutputError(
            f"{remote.staging}: an unfinished run left its work; use --resume to go on, or --overwrite to start afresh"
        )


def finished_manifest(remote: RemoteFolder, folder: Path) -> bool:
    """Whether a conversion was finished there, and none is under way; if so, fetches its manifest into a folder."""
    return not remote.staging.exists() and remote.fetch(MANIFEST, folder / MANIFEST)


@contextmanager
def published_folder(remote: RemoteFolder, *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """Yields a local folder for files that are not uploaded at once; uploads them on success, keeps them on failure.

    Raises:
        OutputError: the URL or the folder is in the way, in use, or cannot be written.
    """
    check_remote(remote, overwrite=overwrite, resume=resume)
    staging = remote.staging
    try:
        staging.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{staging}: cannot be created ({error.strerror}); change to another folder") from None
    with locked_folder(staging):
        if not resume:
            clear_folder(staging)
        if overwrite:
            _remove_earlier(remote)
        yield staging
        names = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
        for name in sorted((name for name in names if name != JOURNAL), key=_rank):
            remote.send(staging / name, name)
        shutil.rmtree(staging)


def _rank(name: str) -> tuple[int, str]:
    """Sort key: the files by which readers find a model come last."""
    if name == MANIFEST:
        return 3, name
    if name == "model_index.json":
        return 2, name
    return int(name.endswith(("config.json", ".index.json"))), name


def _remove_earlier(remote: RemoteFolder) -> None:
    """Removes the files of an earlier conversion, those by which readers find the model first."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / MANIFEST
        files = read_json(manifest).get("files", {}) if remote.fetch(MANIFEST, manifest) else {}
    for name in sorted([MANIFEST, *files], key=_rank, reverse=True):
        if ".." not in name.split("/"):
            remote.remove(name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
