"""A file that is open for reading: any bytes of it, by several threads at once.

Bytes go straight to where they are wanted (`preadv`): nothing stays mapped.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from omni_convert.formats.errors import CheckpointError

__all__ = ["FileDescriptor", "OpenFile"]


class OpenFile:
    """A regular file of weights.

    Attributes:
        path: the file
        size: its bytes
        descriptor: what it is open through
    """

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
            CheckpointError: it cannot be opened, or is no regular file.
        """
        self.path = path
        self.descriptor = _open(path)
        self.size = os.fstat(self.descriptor.number).st_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`; raises as `read_into`."""
        buffer = bytearray(stop - start)
        self.read_into(memoryview(buffer), start)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a buffer of bytes with those from `offset` on.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        done = 0
        while done < len(buffer):  # one call moves at most 2 GiB
            try:
                count = os.preadv(self.descriptor.number, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
            if not count:
                raise CheckpointError(
                    f"{self.path}: found its end at byte {offset + done}, expected {self.size} bytes; "
                    "it was changed while it was read, start again"
                )
            done += count


def _open(path: Path) -> FileDescriptor:
    try:
        # Opening a pipe would wait for its writer without O_NONBLOCK; regular files ignore the flag.
        descriptor = FileDescriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except (OSError, ValueError) as error:  # ValueError: the name holds a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be opened ({reason}), expected a file of weights") from None
    if not stat.S_ISREG(os.fstat(descriptor.number).st_mode):
        raise CheckpointError(f"{path}: found a folder or device, expected a file of weights")
    return descriptor


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
