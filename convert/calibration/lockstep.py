"""Runs prompts side by side, so that each block of a streamed pipeline is read once for all of them.

Every prompt has a thread, and one thread runs at a time. A thread that comes to a block waits there until all others
have come as far; then they run the block one after another, in the order of the prompts. Each thread computes what it
would compute alone, in the same order, so its result is the same bit for bit.

Prompts need memory while they wait. All of them encode their texts; then as many as fit, a *group*, denoise together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from omni_convert.loaders.memory.streaming import Part, Streamer

__all__ = ["Lockstep", "run_jobs"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Threads at a time.
MOST_PROMPTS = 64
#: Of the bytes that go into a block, what a prompt keeps while it waits, and what it needs while the block runs.
WAITING, RUNNING = 4, 24


def run_jobs(
    streamer: Streamer | None,
    jobs: Sequence[Callable[[], Result]],
    after_group: Callable[[Sequence[int]], None] = lambda _: None,
) -> list[Result]:
    """Runs one job for each prompt: one after another, or side by side if their model is streamed.

    Args:
        streamer: what streams the model that the jobs run; None if it is loaded whole
        after_group: called with the positions of jobs that have finished

    Returns:
        the results of the jobs, in their order

    Raises:
        BaseException: what the first job that failed has raised.
    """
    results: list[Result] = []
    if streamer is None:
        for position, job in enumerate(jobs):
            results.append(job())
            after_group([position])
        return results
    for start in range(0, len(jobs), MOST_PROMPTS):
        results += Lockstep[Result](streamer, after_group, start).run(jobs[start : start + MOST_PROMPTS])
    return results


class _AbandonedError(BaseException):
    """Ends a thread when another has failed; no pipeline catches it."""


class _Runner(Generic[Result]):
    """One prompt.

    Attributes:
        part: where it waits; None before its start
        arrivals: the number of times that it has waited
        is_held: it waits for its group to begin
        is_admitted: its group has begun
        is_done: it has a result
        error: why it ended without one
    """

    def __init__(self, job: Callable[[], Result]) -> None:
        self.job = job
        self.turn = threading.Event()
        self.part: Part | None = None
        self.arrivals = 0
        self.is_held = False
        self.is_admitted = False
        self.is_done = False
        self.error: BaseException | None = None
        self.result: list[Result] = []


class Lockstep(Generic[Result]):
    """Runs jobs that all run one streamed pipeline."""

    def __init__(
        self, streamer: Streamer, after_group: Callable[[Sequence[int]], None] = lambda _: None, first: int = 0
    ) -> None:
        """Prepares to run.

        Args:
            after_group: called with the positions of the jobs of each group that has finished
            first: the position of the first job
        """
        self._streamer = streamer
        self._after_group = after_group
        self._first = first
        self._runners: list[_Runner[Result]] = []
        self._capacity = 1
        self._group: list[int] = []
        self._part: Part | None = None
        self._has_failed = False
        self._is_over = threading.Event()
        self._own = threading.local()

    def run(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of the jobs, in their order.

        Raises:
            BaseException: what the first job that failed has raised; the others are given up.
        """
        if not jobs:
            return []
        self._runners = [_Runner(job) for job in jobs]
        threads = [
            threading.Thread(target=self._run, args=(runner,), name="prompt", daemon=True) for runner in self._runners
        ]
        self._streamer.gate = self._arrive
        try:
            for thread in threads:
                thread.start()
            self._pass_on()
            self._is_over.wait()
        finally:
            self._abandon()
            for thread in threads:
                thread.join()
            self._streamer.gate = None
            self._streamer.release()
        for runner in self._runners:
            if runner.error is not None and not isinstance(runner.error, _AbandonedError):
                raise runner.error
        return [result for runner in self._runners for result in runner.result]

    def _run(self, runner: _Runner[Result]) -> None:
        self._own.runner = runner
        try:
            self._await_turn(runner)
            runner.result.append(runner.job())
            runner.is_done = True
            self._pass_on()
        except BaseException as error:  # noqa: BLE001  # `run` raises it in the thread of its caller
            runner.error = error
            self._abandon()

    def _arrive(self, part: Part, size: int) -> None:
        """Waits until this thread may run a part, with tensors of so many bytes going into it."""
        runner: _Runner[Result] = self._own.runner
        runner.part = part
        runner.arrivals += 1
        if part.repeats and not runner.is_admitted:
            runner.is_held = True
        if part.repeats and part.block and len(self._group) == 1 and self._capacity == 1:
            self._capacity = self._room_for(size)
            self._admit(self._capacity - 1)
        self._pass_on()
        self._await_turn(runner)

    def _room_for(self, size: int) -> int:
        """The number of prompts of which each puts tensors of so many bytes into a block."""
        return max(1, (self._streamer.room() - RUNNING * size) // max(1, WAITING * size))

    def _await_turn(self, runner: _Runner[Result]) -> None:
        runner.turn.wait()
        runner.turn.clear()
        if self._has_failed:
            raise _AbandonedError

    def _pass_on(self) -> None:
        """Gives the turn to a thread that waits where the last one ran, or else to the one that has come least far."""
        if all(self._runners[index].is_done for index in self._group):
            self._end_group()
        ready = [runner for runner in self._runners if not runner.is_done and not runner.is_held]
        if not ready:
            self._admit(self._capacity)
            ready = [runner for runner in self._runners if not runner.is_done and not runner.is_held]
        if not ready:
            self._group = [index for index, runner in enumerate(self._runners) if not runner.is_admitted]
            self._end_group()  # of those that ran no denoising model
            self._is_over.set()
            return
        here = [runner for runner in ready if runner.part is self._part]
        chosen = min(here or ready, key=lambda runner: runner.arrivals)
        self._part = chosen.part
        chosen.turn.set()

    def _admit(self, count: int) -> None:
        """Lets some of those that wait for their group denoise."""
        held = [index for index, runner in enumerate(self._runners) if runner.is_held]
        for index in held[:count]:
            self._runners[index].is_held = False
            self._runners[index].is_admitted = True
            self._group.append(index)

    def _end_group(self) -> None:
        group, self._group = self._group, []
        if group:
            logger.info("a group of %d prompts has run", len(group))
            self._streamer.groups.append(len(group))
            self._after_group([self._first + index for index in group])

    def _abandon(self) -> None:
        """Ends every thread at the next block it comes to."""
        self._has_failed = True
        for runner in self._runners:
            runner.turn.set()
        self._is_over.set()
