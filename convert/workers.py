"""Threads that share the work of a conversion; torch, hashing and file I/O all release the interpreter lock."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

__all__ = ["Workers", "available_cores", "keep_freed_memory", "one_thread"]

Result = TypeVar("Result")

# glibc's numbers for three options of its allocator; the largest threshold that all its releases accept, which is more
# than any tensor of a tile; and the bytes that may stay free at the end of the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MMAP_THRESHOLD = 32 << 20
KEPT_BYTES = 256 << 20


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A pool of threads, in each of which torch uses one core.

    As a context manager it waits for its tasks. After an exception it drops tasks that have not begun, and ends those
    that call `check`.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._is_stopped = False
        keep_freed_memory()
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="convert", initializer=_use_one_core)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_stopped = kind is not None
        self._pool.shutdown(cancel_futures=self._is_stopped)
        torch.set_num_threads(self._torch_threads)  # new threads inherit the last setting

    def check(self) -> None:
        """Ends the calling task if its result is no longer needed."""
        if self._is_stopped:
            raise CancelledError

    def submit(self, task: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Calls `task(*arguments)` in a thread."""
        return self._pool.submit(task, *arguments)

    def in_order(self, tasks: Iterable[Callable[[], Result]], ahead: int) -> Iterator[Result]:
        """Results of tasks in their order, while up to `ahead` later tasks are running.

        The next task is taken from `tasks` only then, so that `tasks` may itself wait for these threads.
        """
        pending: deque[Future[Result]] = deque()
        for task in tasks:
            pending.append(self._pool.submit(task))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread for what the calling thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _use_one_core() -> None:
    torch.get_num_threads()  # reads the setting of the process now, which the first operation would otherwise do later
    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Makes the allocator reuse the memory of a tile for the next, which the system would otherwise map and clear."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_ARENA_MAX, 1)  # heaps of threads have 64 MiB and return to the system whatever else is set
