"""Reads weights into the page cache while Python still imports torch, which takes seconds."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from omni_convert.formats.containers.component import DENOISERS

__all__ = ["start_reading"]

# More than a disk reads in that time, and little enough not to displace other data from memory.
LIMIT = 2 << 30
BLOCK = 8 << 20


def start_reading(model: Path) -> None:
    """Asks the system to read the first weights of a model; this is only a hint, and errors are ignored."""
    threading.Thread(target=_read_ahead, args=(model,), daemon=True).start()


def _read_ahead(model: Path) -> None:
    folders = [model / name for name in DENOISERS if (model / name).is_dir()] or [model]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))] if model.is_dir() else [model]
    left = LIMIT
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return
        try:
            size = min(left, os.fstat(descriptor).st_size)
            for start in range(0, size, BLOCK):  # the system accepts only a few MiB per call
                os.posix_fadvise(descriptor, start, BLOCK, os.POSIX_FADV_WILLNEED)
            left -= size
        except OSError:
            return
        finally:
            os.close(descriptor)
