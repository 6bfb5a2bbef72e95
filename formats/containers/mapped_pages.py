"""Pages of mapped files: they take memory of the process from their first use until they are given up."""

from __future__ import annotations

import ctypes
import math
import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from omni_convert.formats.errors import OutputError

__all__ = ["give_up", "give_up_pages", "read_pages", "scratch_zeros"]

# Linux's numbers; Python's own `madvise` would hold the interpreter's lock while the disk reads.
MADV_DONTNEED, MADV_POPULATE_READ = 4, 22

_madvise: Callable[..., int] | None = getattr(ctypes.CDLL(None), "madvise", None)


def read_pages(address: int, size: int) -> None:
    """Brings mapped bytes into memory now; without this, each page would come at its first use."""
    _advise(address, size, MADV_POPULATE_READ)


def give_up_pages(address: int, size: int) -> None:
    """Takes mapped bytes out of the process; the next use reads them again. The system may keep them in its cache."""
    _advise(address, size, MADV_DONTNEED)


def _advise(address: int, size: int, advice: int) -> None:
    """A hint that may come to nothing: older systems read page by page, and keep what they have."""
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    if _madvise is not None and size:
        _madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), advice)


def scratch_zeros(shape: tuple[int, ...], folder: Path) -> Tensor:
    """Float32 zeros in a temporary file of a folder; changes go to the disk, and the file is deleted with the tensor.

    Raises:
        OutputError: the folder cannot be written to.
    """
    count = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:  # the mapping outlives its name
            file.truncate(count * torch.float32.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=torch.float32).view(shape)
    except OSError as error:
        raise OutputError(f"{folder}: cannot hold a scratch file ({error.strerror})") from None


def give_up(tensor: Tensor) -> None:
    """Takes the pages of a tensor of `scratch_zeros` out of the process; does nothing to one in memory of its own."""
    if tensor.untyped_storage().filename is not None:
        give_up_pages(tensor.data_ptr(), tensor.nbytes)
