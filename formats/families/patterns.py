"""The meaning of a layer pattern, wherever one is accepted."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from omni_convert.formats.errors import did_you_mean, nearest

__all__ = ["matches", "suggestion_for"]


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` means the layer `name` (a state-dict stem or a runtime name).

    A pattern is the name itself, with or without `.weight`; an fnmatch pattern, in which `*` spans dots; or a dotted
    part of it (`img_mlp`, `transformer_blocks.0`).
    """
    wanted = pattern.removesuffix(".weight")
    return fnmatchcase(name, wanted) or f".{wanted}." in f".{name}."


def suggestion_for(pattern: str, names: Collection[str]) -> str:
    """`; did you mean 'layers.1*'?` for a pattern that matches none of these layers, or nothing if none is near."""
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    mended = ".".join(_nearest_part(part, parts) for part in pattern.split("."))
    if mended != pattern and any(matches(mended, name) for name in names):
        return did_you_mean(mended, [mended])
    return did_you_mean(pattern, [*sorted(names), *parts])


def _nearest_part(part: str, known: Collection[str]) -> str:
    """The part itself if it names something, or is a number or nothing but wildcards."""
    if not any(map(str.isalpha, part)) or any(fnmatchcase(each, part) for each in known):
        return part
    return nearest(part, known) or part
