"""What a user means by a layer pattern, wherever one is accepted."""

from __future__ import annotations

from fnmatch import fnmatchcase

__all__ = ["matches"]


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` means the layer `name` (a state-dict stem or a runtime name).

    A pattern is the name itself, with or without `.weight`; an fnmatch pattern, in which `*` spans dots; or a dotted
    part of it (`img_mlp`, `transformer_blocks.0`).
    """
    wanted = pattern.removesuffix(".weight")
    return fnmatchcase(name, wanted) or f".{wanted}." in f".{name}."
