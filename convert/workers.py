"""Threads that share the work of a conversion; torch, hashing and files all let go of the interpreter."""

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

# glibc's numbers of three options of its allocator, the largest threshold that all its releases take (more than any
# tensor of a tile has), and what may stay free at the end of the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MMAP_THRESHOLD = 32 << 20
KEPT_BYTES = 256 << 20


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A number of threads, in each of which torch uses one core.

    As a context manager it waits for its tasks; left through an exception, it drops those that have not begun and ends
    those that ask `check`.
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
        torch.set_num_threads(self._torch_threads)  # threads yet to come take over what was set last

    def check(self) -> None:
        """Ends the task that asks, when nobody waits for it any more."""
        if self._is_stopped:
            raise CancelledError

    def submit(self, task: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Has a thread call `task(*arguments)`."""
        return self._pool.submit(task, *arguments)

    def in_order(self, tasks: Iterable[Callable[[], Result]], ahead: int) -> Iterator[Result]:
        """Results of tasks in their order, while up to `ahead` later ones are under way.

        `tasks` is asked for the next one only then: it may itself wait for what these threads do.
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
    """Has torch use one thread for what this one computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _use_one_core() -> None:
    torch.get_num_threads()  # takes over the setting of the process, which torch would else do at the first operation
    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Has the allocator reuse the memory of one tile for the next, which the system would else map and clear anew."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_ARENA_MAX, 1)  # the heaps of threads have 64 MiB, and go back to the system whatever else is set
