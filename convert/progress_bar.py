"""Progress bars on standard error for work that takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]

# Seconds of work after which the bar appears.
PROGRESS_DELAY = 2.0


@contextmanager
def progress_bar(
    what: str, total: int | None, unit: str = "B", *, hidden: bool, stays: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows a bar if standard error is a terminal and the work takes longer than two seconds.

    Args:
        what: text before the bar, for example "converting"
        total: number of units to do; None if it is unknown
        unit: name of a unit; bytes are shown in MB and GB
        hidden: show no bar
        stays: leave the bar on the screen when the work is done

    Yields:
        A function to call with the number of units that were done since the last call.
    """
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        delay=PROGRESS_DELAY,
        disable=True if hidden else None,  # None: only on a terminal
        leave=stays,
    ) as bar:
        yield bar.update
