"""Everything that can go wrong because of what the user gave us, as one tree.

    OmniConvertError            base; the command line prints it as one line and exits with 1
    ├── CheckpointError         a file or folder is damaged, hostile, incomplete or not what it claims to be
    ├── RecipeError             the request contradicts itself, the model or the format
    ├── CalibrationError        prompts or statistics are missing, empty or belong to another model
    ├── OutputError             the output folder cannot be created, written or replaced
    ├── KernelError             no kernel can run a layer as asked
    ├── ClusterError            machines that share the work cannot be reached, differ, or are lost too often
    └── HubError                the Hub refuses, fails, cannot be reached, or has no such thing

A message reads `where: found, expected, remedy`. Anything else that is raised is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ClusterError",
    "HubError",
    "KernelError",
    "OmniConvertError",
    "OutputError",
    "RecipeError",
    "counted",
    "did_you_mean",
    "listed",
    "nearest",
    "quoted",
]

#: How similar a known name must be to be suggested for a mistyped one.
SIMILARITY = 0.5
#: Longer names are cut before they are compared, which takes quadratic time.
COMPARED_CHARACTERS = 200


class OmniConvertError(Exception):
    """Base of all errors that the user can do something about."""


class CheckpointError(OmniConvertError):
    """A checkpoint is damaged, hostile, incomplete or not what it claims to be."""


class RecipeError(OmniConvertError):
    """The request contradicts itself, the model or the format."""


class CalibrationError(OmniConvertError):
    """Prompts or statistics are missing, empty, or belong to another model."""


class OutputError(OmniConvertError):
    """The output folder cannot be created, written or replaced."""


class KernelError(OmniConvertError):
    """No kernel can run a layer as asked."""


class ClusterError(OmniConvertError):
    """The machines that share the work cannot be reached, differ, or are lost too often."""


class HubError(OmniConvertError):
    """The Hub refuses, fails, cannot be reached, or has no such thing.

    Attributes:
        is_unreachable: it did not answer at all
    """

    def __init__(self, message: str, *, is_unreachable: bool = False) -> None:
        super().__init__(message)
        self.is_unreachable = is_unreachable


def quoted(name: str) -> str:
    """An untrusted name, quoted and shortened for a one-line message."""
    shown = repr(name)
    return shown if len(shown) <= 100 else f"{shown[:60]}...{shown[-36:]}"


def counted(number: int, noun: str) -> str:
    """A number and its noun: '1 tensor', '2 tensors'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Names for a message, at most so many of them: `a, b and 3 more`."""
    shown = separator.join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def nearest(name: str, known: Iterable[str], similarity: float = SIMILARITY) -> str | None:
    """The known name that is most like a mistyped one, or None if none is near."""
    near = difflib.get_close_matches(name[:COMPARED_CHARACTERS], list(known), n=1, cutoff=similarity)
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'fp8'?` for a mistyped name, or nothing when no known name is near."""
    near = nearest(name, known)
    return f"; did you mean '{near}'?" if near is not None else ""
