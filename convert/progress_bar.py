"""Bars on standard error, of work that takes a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]

# A bar appears when the work has taken this many seconds.
PROGRESS_DELAY = 2.0


@contextmanager
def progress_bar(
    what: str, total: int | None, unit: str = "B", *, hidden: bool, stays: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar, if standard error is a terminal and the work is not done in two seconds.

    Args:
        what: is done
        total: how many there are to do; None if nobody knows
        unit: of these; bytes are shown in MB and GB
        hidden: no bar
        stays: on the screen when the work is done

    Yields:
        What is called with how many more are done.
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
