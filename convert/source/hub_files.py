"""The weights of a repository on the Hub at one commit: a file is downloaded when it is read, and removed afterwards.

So the disk holds one or two files of the source, never all of them. A file in the Hub's cache is read there and stays.
A file that is read again after its removal is downloaded again: a wrong count costs time, not correctness.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented as theirs, not marked as exported
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from omni_convert.convert.source.hub import ask_hub
from omni_convert.formats.containers.header import MAX_HEADER_BYTES
from omni_convert.formats.errors import CheckpointError, HubError

__all__ = ["HubFile", "HubFiles"]

POLL_SECONDS = 0.2
# Bytes of the first request; the headers of most popular models fit into them.
FIRST_BYTES = 128 << 10
LENGTH_BYTES = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub: its size in bytes, and the Hub's hash of its content."""

    size: int
    identity: str


class HubFiles:
    """The files of a repository; all methods may be called from any thread.

    Attributes:
        repo_id: the repository
        commit: the commit of all files
        known: every file of the repository, by name
        streamed: names of the files that are downloaded when they are read
        peak: most bytes of streamed files that were on the disk at once
    """

    def __init__(self, repo_id: str, commit: str, known: Mapping[str, HubFile], streamed: frozenset[str]) -> None:
        self.repo_id = repo_id
        self.commit = commit
        self.known = known
        self.streamed = streamed
        self.peak = 0
        self._headers: dict[str, bytes] = {}
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._fetched: dict[str, Future[Path]] = {}
        self._started: list[Future[Path]] = []
        self._gone: set[str] = set()

    def where(self, name: str) -> str:
        """The name of a file in messages."""
        return f"{self.repo_id}/{name}"

    def header(self, name: str) -> bytes:
        """The JSON of a safetensors file's header; the rest of the file is not downloaded.

        Raises:
            CheckpointError: the file has no complete header.
            HubError: the Hub cannot deliver it.
        """
        if name not in self._headers:
            self._headers[name] = self._fetch_header(name)
        return self._headers[name]

    def _fetch_header(self, name: str) -> bytes:
        size = self.known[name].size
        start = self._read(name, 0, min(size, FIRST_BYTES))
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise CheckpointError(
                f"{self.where(name)}: found a header of {length} bytes in a file of {size}; this is not a complete "
                "safetensors file"
            )
        end = LENGTH_BYTES + length
        return start[LENGTH_BYTES:end] + (self._read(name, len(start), end) if end > len(start) else b"")

    def _read(self, name: str, start: int, stop: int) -> bytes:
        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

        def request() -> bytes:
            response = http_backoff("GET", url, headers=headers, max_retries=0)
            hf_raise_for_status(response)
            return bytes(response.content)

        content = ask_hub(self.where(name), request)
        if len(content) != stop - start:
            raise HubError(
                f"{self.where(name)}: found {len(content)} bytes, expected the {stop - start} that were asked for; "
                "this Hub cannot be streamed from, use --keep-source"
            )
        return content

    @contextmanager
    def kept_in(self, folder: Path) -> Iterator[None]:
        """Downloads files into a folder while it is entered; after a failure they stay there for a later run."""
        self._folder = folder.resolve()
        try:
            yield
        except BaseException:
            self._folder = None  # ends every wait for a file
            raise
        self._folder = None
        log.info("%s: at most %d of %d bytes of weights were on the disk", self.repo_id, self.peak, self._total())

    def clear(self) -> None:
        """Removes every downloaded file; a later read downloads its file again."""
        wait(self._started)
        with self._lock:
            self._fetched.clear()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def path(self, name: str) -> Path:
        """The path of a file on the disk; waits until it is downloaded.

        Raises:
            HubError: the Hub cannot deliver it.
            CancelledError: the conversion has ended meanwhile.
        """
        with self._lock:
            if self._folder is None:
                raise CancelledError
            fetched = self._fetched.get(name) or self._start(name, self._folder)
            following = self._following(name)
            if following is not None:
                self._start(following, self._folder)
        while self._folder is not None:
            if wait([fetched], POLL_SECONDS).done:
                return fetched.result()
        raise CancelledError

    def release(self, name: str) -> None:
        """Removes a file that is no longer needed."""
        with self._lock:
            self._gone.add(name)
            fetched = self._fetched.pop(name, None)
            if fetched is None or not fetched.done() or fetched.exception() is not None or self._folder is None:
                return
            path = fetched.result()
            if path.resolve().is_relative_to(self._folder):
                path.unlink(missing_ok=True)

    def _start(self, name: str, folder: Path) -> Future[Path]:
        """Starts the download of a file in a daemon thread, which does not keep the process alive."""
        fetched: Future[Path] = Future()
        self._fetched[name] = fetched
        self._started.append(fetched)
        self._gone.discard(name)
        self.peak = max(self.peak, self._held())
        threading.Thread(target=self._fetch, args=(name, folder, fetched), daemon=True).start()
        return fetched

    def _fetch(self, name: str, folder: Path, fetched: Future[Path]) -> None:
        try:
            cached = try_to_load_from_cache(self.repo_id, name, revision=self.commit)
            path = Path(cached) if isinstance(cached, str) else self._download(name, folder)
        except BaseException as error:  # noqa: BLE001 - it belongs to the threads that wait for the file
            fetched.set_exception(error)
        else:
            fetched.set_result(path)

    def _download(self, name: str, folder: Path) -> Path:
        return Path(
            ask_hub(
                self.where(name),
                lambda: hf_hub_download(self.repo_id, name, revision=self.commit, local_dir=folder),
            )
        )

    def _following(self, name: str) -> str | None:
        """The component's next file of weights, if it may be downloaded now: half of the source stays on the Hub."""
        component = name.rpartition("/")[0]
        later = [other for other in sorted(self._headers) if other > name and other.rpartition("/")[0] == component]
        if not later or later[0] in self._fetched or later[0] in self._gone:
            return None
        return later[0] if 2 * (self._held() + self.known[later[0]].size) <= self._total() else None

    def _held(self) -> int:
        return sum(self.known[name].size for name in self._fetched)

    def _total(self) -> int:
        return sum(self.known[name].size for name in self.streamed)
