"""Weights that stay in their file: tensors are views of its mapped pages, which come and go while the views stay.

Nothing is copied. A page that is read takes memory of the process (`RssFile`) until it is given up; after that a view
of it is as good as before, and the next use reads the page again.
"""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from omni_convert.formats.containers.mapped_pages import give_up_pages, read_pages
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.errors import CheckpointError

__all__ = ["MappedFile"]

# The system accepts only a few MiB per call of `posix_fadvise`.
AHEAD = 8 << 20
MAP_NORESERVE = 0x4000  # Python has no name for it before 3.13


# Private, so that what is written stays out of the file; and without a reserve, which Linux refuses to files that are
# larger than memory.
MAPPING = mmap.MAP_PRIVATE | (MAP_NORESERVE if sys.platform == "linux" else 0)


class MappedFile:
    """A safetensors file in memory, page by page as it is needed.

    Attributes:
        path: the file
        specs: its tensors by name
    """

    def __init__(self, path: Path) -> None:
        """Maps a file whose header is sound.

        Raises:
            CheckpointError: the file cannot be read, or is damaged.
        """
        with SafetensorsFile(path) as file:
            self.path = path
            self.specs = file.specs
            self._offsets = {name: file.offset(name) for name in file.specs}
        try:
            with path.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, MAPPING, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped into memory ({error})") from None
        self._address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()

    def tensor(self, name: str) -> Tensor:
        """A view of a tensor's bytes in the file."""
        spec = self.specs[name]
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        count = spec.nbytes // spec.dtype.itemsize
        return torch.frombuffer(self._map, dtype=spec.dtype, count=count, offset=self._offsets[name]).view(spec.shape)

    def read(self, name: str) -> None:
        """Brings a tensor's pages into memory now; without this, each would come at its first use."""
        read_pages(self._address + self._offsets[name], self.specs[name].nbytes)

    def give_up(self, name: str) -> None:
        """Takes a tensor's pages out of the process; the system may keep them in its page cache."""
        give_up_pages(self._address + self._offsets[name], self.specs[name].nbytes)

    def read_ahead(self, name: str) -> None:
        """Has the system read a tensor into its page cache."""
        if not hasattr(os, "posix_fadvise"):  # macOS has none
            return
        begin = self._offsets[name]
        end = begin + self.specs[name].nbytes
        with suppress(OSError), self.path.open("rb") as file:
            for start in range(begin, end, AHEAD):
                os.posix_fadvise(file.fileno(), start, min(AHEAD, end - start), os.POSIX_FADV_WILLNEED)
