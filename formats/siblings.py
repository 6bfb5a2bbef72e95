"""Blocks that lack what their siblings have: names and shapes alone tell, no model is built.

Of the blocks `layers.0`, `layers.1`, ... nearly all must be alike, or nothing is said. One that has tensors of its own
is of another kind, as the last of Stable Diffusion 3 and Mochi are, unless these are misspelled names of what it lacks.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Gap", "gaps"]

# The outermost number of a name; more digits would be no block's.
NUMBERED = re.compile(r"(.+?)\.(\d{1,4})\.(.+)")
# One of so many blocks may differ from the rest; of fewer, one.
ODD_IN = 8
SIMILARITY = 0.8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Gap:
    """A tensor that is missing.

    Attributes:
        sibling: its name in another block
        stray: a tensor that nearly has its name; None if there is none
    """

    name: str
    sibling: str
    stray: str | None

    @property
    def reason(self) -> str:
        beside = f", but '{self.stray}'" if self.stray else ""
        return f"found no '{self.name}'{beside}, expected it as '{self.sibling}' is there"


def gaps(shapes: Mapping[str, Shape], quantized: Collection[str]) -> Iterator[Gap]:
    """Every tensor that a block lacks.

    Args:
        shapes: name to shape of all weights, quantized ones as [out, in], and of all other tensors
        quantized: names of quantized weights; lists of blocks without any are left alone
    """
    lists: dict[str, dict[int, dict[str, Shape]]] = {}
    for name, shape in shapes.items():
        if match := NUMBERED.fullmatch(name):
            lists.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = shape
    with_codes = {match[1] for name in quantized if (match := NUMBERED.fullmatch(name))}
    for prefix, blocks in lists.items():
        if prefix in with_codes and max(blocks) <= 2 * len(blocks):
            yield from _of_list(prefix, blocks)


def _of_list(prefix: str, blocks: Mapping[int, Mapping[str, Shape]]) -> Iterator[Gap]:
    numbers = range(max(blocks) + 1)
    kinds = Counter(frozenset(blocks.get(number, {}).items()) for number in numbers)
    ((usual, count),) = kinds.most_common(1)
    if count < 2 or len(numbers) - count > max(1, len(numbers) // ODD_IN):
        return
    expected = dict(sorted(usual))
    like = next(number for number in numbers if blocks.get(number) == expected)
    for number in numbers:
        found = blocks.get(number, {})
        misspelled = _misspelled(found, expected)
        for rest in expected if misspelled is not None else ():
            if rest not in found:
                stray = misspelled.get(rest) if misspelled else None
                yield Gap(
                    f"{prefix}.{number}.{rest}", f"{prefix}.{like}.{rest}", stray and f"{prefix}.{number}.{stray}"
                )


def _misspelled(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> dict[str, str] | None:
    """What is missing → the name that it has here; None for a block of another kind."""
    names: dict[str, str] = {}
    for extra, shape in found.items():
        if expected.get(extra) == shape:
            continue
        absent = [rest for rest in expected if rest not in found and rest not in names]
        near = difflib.get_close_matches(extra, absent, n=1, cutoff=SIMILARITY)
        # Rows alone, for the columns of codes may be packed.
        if extra in expected or not near or shape[:1] != expected[near[0]][:1]:
            return None
        names[near[0]] = extra
    return names
