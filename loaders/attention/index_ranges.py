"""Reads the numbers of layers or denoising steps as users of serving engines write them: `0-9,20,25-30`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from omni_convert.formats.errors import RecipeError

__all__ = ["IndexRanges", "IndexSpec"]

#: `"0-9,20,25-30"`, a number, or a list of numbers and such texts; None selects nothing
IndexSpec = str | int | Iterable[int | str] | None

PART = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")


@dataclass(frozen=True)
class IndexRanges:
    """A set of numbers from zero, kept as ranges. The empty set is false."""

    ranges: tuple[range, ...] = ()

    @classmethod
    def parse(cls, spec: IndexSpec, where: str) -> IndexRanges:
        """Reads what the user wrote. Both ends of a range belong to it.

        Args:
            where: the option, for messages

        Raises:
            RecipeError: a part is neither a number nor a range that goes up.
        """
        if spec is None:
            return cls()
        if isinstance(spec, bytes) or not isinstance(spec, str | int | Iterable):
            raise RecipeError(f"{where}: found {spec!r:.40}, expected numbers and ranges such as 0-9,20,25-30")
        parts = str(spec).split(",") if isinstance(spec, str | int) else [str(part) for part in spec]
        return cls(tuple(_range_of(part, where) for part in parts))

    def __contains__(self, number: int) -> bool:
        return any(number in numbers for numbers in self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __str__(self) -> str:
        return ",".join(
            str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}" for numbers in self.ranges
        )


def _range_of(part: str, where: str) -> range:
    match = PART.fullmatch(part)
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else -1
    if last < first:
        raise RecipeError(f"{where}: found {part!r}, expected numbers and ranges that go up, such as 0-9,20,25-30")
    return range(first, last + 1)
