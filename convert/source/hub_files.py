"""The weights of a repository on the Hub, at one commit: a file comes when it is read and goes when it was.

So the disk holds a file or two of the source, never all of it. A file that the Hub's cache has is read there and stays.
One that is read again after it went is fetched again: whoever counts wrongly loses time, not correctness.
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
# Every header of the Hub's popular models but a few fits into this.
FIRST_BYTES = 128 << 10
LENGTH_BYTES = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFile:
    """What the Hub says about a file: bytes, and the hash by which it knows the content."""

    size: int
    identity: str


class HubFiles:
    """Files of a repository, any thread's to ask for.

    Attributes:
        repo_id: the repository
        commit: to which all of this belongs
        known: every file of it, by name
        streamed: the names of those that come when they are read
        peak: most bytes of them that were on the disk at once
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
        """A file, for messages."""
        return f"{self.repo_id}/{name}"

    def header(self, name: str) -> bytes:
        """The JSON of a safetensors file's header; no more of the file is fetched.

        Raises:
            CheckpointError: there is none.
            HubError: the Hub does not deliver it.
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
                f"{self.where(name)}: found a header of {length} bytes in a file of {size}; this is no complete "
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
        """Has files come into a folder; after a failure they stay there for a later run."""
        self._folder = folder.resolve()
        try:
            yield
        except BaseException:
            self._folder = None  # whoever waits for a file shall no longer
            raise
        self._folder = None
        log.info("%s: at most %d of %d bytes of weights were on the disk", self.repo_id, self.peak, self._total())

    def clear(self) -> None:
        """Removes everything that came; the next to ask for it has it fetched again."""
        wait(self._started)
        with self._lock:
            self._fetched.clear()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def path(self, name: str) -> Path:
        """A file on the disk; waits until it is there.

        Raises:
            HubError: the Hub does not deliver it.
            CancelledError: nobody needs it any more.
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
        """Removes a file, which is not needed any more."""
        with self._lock:
            self._gone.add(name)
            fetched = self._fetched.pop(name, None)
            if fetched is None or not fetched.done() or fetched.exception() is not None or self._folder is None:
                return
            path = fetched.result()
            if path.resolve().is_relative_to(self._folder):
                path.unlink(missing_ok=True)

    def _start(self, name: str, folder: Path) -> Future[Path]:
        """Begins to fetch a file; a thread of its own, which need not end for the process to end."""
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
        """The next file of weights of the component, if it may come already: half of the source stays away."""
        component = name.rpartition("/")[0]
        later = [other for other in sorted(self._headers) if other > name and other.rpartition("/")[0] == component]
        if not later or later[0] in self._fetched or later[0] in self._gone:
            return None
        return later[0] if 2 * (self._held() + self.known[later[0]].size) <= self._total() else None

    def _held(self) -> int:
        return sum(self.known[name].size for name in self._fetched)

    def _total(self) -> int:
        return sum(self.known[name].size for name in self.streamed)
