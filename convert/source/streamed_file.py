"""A safetensors file on the Hub, read like one on the disk: its header comes alone, the rest when a tensor is read."""

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
    """See `TensorFile`; `path` is only a name here."""

    def __init__(self, hub_files: HubFiles, name: str) -> None:
        """Fetches the header and checks it.

        Raises:
            CheckpointError: it is damaged.
            HubError: the Hub does not deliver it.
        """
        path, text = Path(hub_files.where(name)), hub_files.header(name)
        super().__init__(path, parse_header(text, hub_files.known[name].size, path), text, None)
        self._hub_files = hub_files
        self._name = name
        self._lock = threading.Lock()

    def _forget(self, _name: str) -> None:
        """Removes the file when all of its bytes were dealt with."""
        if self._bytes_left == 0:
            self.release()

    def release(self) -> None:
        """Removes the file; a read fetches it again."""
        with self._lock:
            self._opened = None
            self._hub_files.release(self._name)

    def on_disk(self) -> Path:
        """The whole file."""
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
            raise CheckpointError(f"{self.path}: found another header in the file than before it came; start again")
        return file._file()  # noqa: SLF001 - of the same base
