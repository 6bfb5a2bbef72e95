"""A file descriptor that outlives its owner's `close` while another thread is still reading or writing through it."""

from __future__ import annotations

import os

__all__ = ["FileDescriptor"]


class FileDescriptor:
    """Closes when the last reference goes: a number closed earlier could by then belong to another file."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)
