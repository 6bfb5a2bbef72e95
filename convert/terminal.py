"""The width of the terminal, and text wrapped to it."""

from __future__ import annotations

import shutil
import textwrap

__all__ = ["MAX_WIDTH", "terminal_width", "wrapped"]

# In narrower lines, names would break.
MIN_WIDTH, MAX_WIDTH = 80, 140


def terminal_width(otherwise: int) -> int:
    """Columns of the terminal, or the value of the variable COLUMNS.

    Args:
        otherwise: columns of an output that is no terminal
    """
    return shutil.get_terminal_size((otherwise, 24)).columns


def wrapped(text: str, first: str, others: str, otherwise: int = MIN_WIDTH) -> list[str]:
    """Wraps a text to the terminal without breaking names.

    Args:
        first: prefix of the first line
        others: prefix of each further line
        otherwise: see `terminal_width`
    """
    return textwrap.wrap(
        text,
        min(MAX_WIDTH, max(MIN_WIDTH, terminal_width(otherwise))),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
