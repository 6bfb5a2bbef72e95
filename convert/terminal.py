"""How wide lines are on a terminal, and lines that are no wider."""

from __future__ import annotations

import shutil
import textwrap

__all__ = ["MAX_WIDTH", "terminal_width", "wrapped"]

# Narrower, lines break inside names.
MIN_WIDTH, MAX_WIDTH = 80, 140


def terminal_width(otherwise: int) -> int:
    """Columns of the terminal, or of the variable COLUMNS.

    Args:
        otherwise: of an output that is no terminal
    """
    return shutil.get_terminal_size((otherwise, 24)).columns


def wrapped(text: str, first: str, others: str, otherwise: int = MIN_WIDTH) -> list[str]:
    """A text in lines that fit the terminal; names stay whole.

    Args:
        first: what the first line begins with
        others: what each further line begins with
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
