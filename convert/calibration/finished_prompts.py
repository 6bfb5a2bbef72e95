"""Keeps the statistics of prompts that have finished, so that an interrupted calibration continues after them.

Statistics merge exactly, so that those of a calibration in several runs are those of one run, bit for bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.recording_header import Identity
from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["FinishedPrompts"]

#: Between two writings of the file, unless the last prompt has finished.
SECONDS = 30.0


class FinishedPrompts:
    """A file with the statistics of finished prompts, and those of this run.

    Attributes:
        earlier: statistics of an earlier run's prompts; None if there is no such run
        remaining: prompts that are still to be run
    """

    def __init__(
        self, path: Path | None, prompts: Sequence[Prompt], identity_of: Callable[[Sequence[Prompt]], Identity]
    ) -> None:
        """Reads the file if it exists.

        Args:
            path: the file; None to keep nothing
            identity_of: the identity of a run of this calibration over some prompts

        Raises:
            CalibrationError: the file is damaged, or comes from another calibration.
        """
        self.earlier = Statistics.load(path) if path is not None and path.exists() else None
        self.remaining = list(prompts)
        self._path = path
        self._identity_of = identity_of
        self._done: list[int] = []
        self._saved = time.monotonic()
        if self.earlier is not None:
            self._leave_out(self.earlier.identity)

    def add(self, positions: Sequence[int], statistics: Callable[[], Statistics]) -> None:
        """Notes that some of the remaining prompts have finished, and writes the file now and then.

        Args:
            positions: those in `remaining`
            statistics: gives what was recorded over all prompts of this run that have finished
        """
        self._done += positions
        if self._path is not None and time.monotonic() - self._saved >= SECONDS:
            self.merged(statistics()).save(self._path)
            self._saved = time.monotonic()

    @property
    def done(self) -> list[Prompt]:
        """Prompts of this run that have finished."""
        return [self.remaining[position] for position in self._done]

    def merged(self, statistics: Statistics) -> Statistics:
        """The statistics of this run and of the earlier one."""
        return statistics if self.earlier is None else self.earlier.merge([statistics])

    def _leave_out(self, found: Identity) -> None:
        """Leaves the prompts out that an earlier run has finished."""
        wanted = self._identity_of(self.remaining)
        finished = Counter(prompt for run in found.runs for prompt in run.prompts)
        ours = Counter(wanted.runs[0].prompts)
        settings = [run.settings for run in found.runs]
        if found.fingerprints != wanted.fingerprints or settings != [wanted.runs[0].settings] or finished - ours:
            raise CalibrationError(
                f"{self._path}: found finished prompts of another calibration, expected the same model, prompts and "
                "settings; --overwrite starts again"
            )
        remaining = []
        for prompt in self.remaining:
            if finished[prompt.fingerprint()]:
                finished[prompt.fingerprint()] -= 1
            else:
                remaining.append(prompt)
        self.remaining = remaining
