"""A safetensors file on the Hub that reads like a local one: the header is fetched first, the rest on demand."""

from __future__ import annotations

import threading
from pathlib import Path

from omni_convert.convert.source.hub_files import HubFiles
from omni_convert.formats.containers.open_file import OpenFile
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.safetensors_header import parse_header
from omni_convert.formats.errors import CheckpointError

__all__ = ["StreamedFile"]


class StreamedFile(TensorFile):
    """A `TensorFile` on the Hub; its `path` serves only as a name in messages."""

    def __init__(self, hub_files: HubFiles, name: str) -> None:
        """Fetches the header and checks it.

        Raises:
            CheckpointError: the header is damaged.
            HubError: the Hub cannot deliver it.
        """
        path, text = Path(hub_files.where(name)), hub_files.header(name)
        super().__init__(path, parse_header(text, hub_files.known[name].size, path), text, None)
        self._hub_files = hub_files
        self._name = name
        self._lock = threading.Lock()

    def _forget(self, _name: str) -> None:
        """Removes the file when all of its bytes have been processed."""
        if self._bytes_left == 0:
            self.release()

    def release(self) -> None:
        """Removes the file; the next read downloads it again."""
        with self._lock:
            self._opened = None
            self._hub_files.release(self._name)

    def on_disk(self) -> Path:
        """The path of the downloaded file."""
        return self._hub_files.path(self._name)

    def _file(self) -> OpenFile:
        opened = self._opened
        if opened is None:
            path = self.on_disk()
            with self._lock:
                if self._opened is None:
                    self._opened = self._checked(path)
                opened = self._opened
        return opened

    def _checked(self, path: Path) -> OpenFile:
        file = SafetensorsFile(path)
        if (file.header_sha256, file.size) != (self.header_sha256, self.size):
            raise CheckpointError(
                f"{self.path}: found another header in the downloaded file than on the Hub before; start again"
            )
        return file._file()  # noqa: SLF001 - of the same base
