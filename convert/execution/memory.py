"""The memory that belongs to this process alone, without mapped files and page cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["PeakMemory", "anonymous_memory", "resident_memory"]

STATUS = Path("/proc/self/status")
LOOK_SECONDS = 0.1


def anonymous_memory() -> int:
    """`RssAnon` of this process in bytes; 0 where the system, unlike Linux, does not report it."""
    return _status("RssAnon:")


def resident_memory() -> int:
    """`VmRSS` of this process in bytes, weights in mapped files included; 0 where the system does not report it."""
    return _status("VmRSS:")


def _status(key: str) -> int:
    if not STATUS.exists():
        return 0
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(key)), f"{key} 0 kB")
    return int(line.split()[1]) * 1024


class PeakMemory:
    """The largest memory use while the context is entered, measured by a thread at intervals.

    Attributes:
        size: bytes
    """

    def __init__(self, measure: Callable[[], int] = anonymous_memory) -> None:
        self.size = 0
        self._measure = measure
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while True:
            self.size = max(self.size, self._measure())
            if self._is_over.wait(LOOK_SECONDS):
                return
