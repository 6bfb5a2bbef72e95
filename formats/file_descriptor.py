"""A file descriptor that outlives its owner's `close` while another thread is still reading or writing through it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress

__all__ = ["FileDescriptor"]

# Linux's; Python has no name for it.
_sync_file_range: Callable[..., int] | None = getattr(ctypes.CDLL(None), "sync_file_range", None)
SYNC_FILE_RANGE_WRITE = 2


class FileDescriptor:
    """Closes when the last reference goes: a number closed earlier could by then belong to another file."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)

    def will_need(self, offset: int, length: int) -> None:
        """Has the system read bytes from the disk while we do something else; a hint that may come to nothing."""
        if hasattr(os, "posix_fadvise"):  # macOS has none
            with suppress(OSError):
                os.posix_fadvise(self.number, offset, length, os.POSIX_FADV_WILLNEED)

    def wont_need(self, offset: int, length: int) -> None:
        """Has the system give up its copy of bytes that nobody will read again soon; as above."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self.number, offset, length, os.POSIX_FADV_DONTNEED)

    def start_writeback(self) -> None:
        """Has the system put what was written on the disk, without waiting for it; as above."""
        if _sync_file_range is not None:
            _sync_file_range(self.number, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)
