"""Names of tensors in a model's own code, which ComfyUI and stable-diffusion.cpp expect.

One tensor there may consist of several of diffusers', stacked along the rows, and its halves may have changed places.
Blocks of codes along the columns, such as GGUF's, move with their rows, so that joining changes no value.

Source: diffusers' conversions of single files (`loaders/single_file_utils.py`), the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from omni_convert.formats.containers.tensor_spec import Run, TensorSpec

__all__ = ["OriginalName", "diffusers_name", "joined", "known_runs", "original_runs", "renamed", "same"]


@dataclass(frozen=True)
class OriginalName:
    """A module or a tensor of the model's own code; `{}` stands for a block's number.

    Attributes:
        original: its name
        parts: the diffusers module or tensor that it is, or those that it joins, in order
        is_turned: its second half is the first in diffusers (scale and shift of a modulation)
    """

    original: str
    parts: tuple[str, ...]
    is_turned: bool = False


def renamed(names: Mapping[str, str], original: str = "", diffusers: str = "") -> tuple[OriginalName, ...]:
    """Rows for modules that only have another name: original to diffusers', each below the prefix given."""
    return tuple(OriginalName(original + theirs, (diffusers + ours,)) for theirs, ours in names.items())


def same(*names: str) -> tuple[OriginalName, ...]:
    """Rows for names that do not differ."""
    return tuple(OriginalName(name, (name,)) for name in names)


def joined(original: str, parent: str, *parts: str) -> OriginalName:
    """The row for a tensor that stacks several of diffusers'."""
    return OriginalName(original, tuple(f"{parent}.{part}" for part in parts))


def original_runs(table: Sequence[OriginalName], specs: Mapping[str, TensorSpec]) -> dict[str, list[Run]] | None:
    """Original name → the rows of diffusers' tensors that the tensor consists of.

    Args:
        table: rows of the model; where several match, the first one counts
        specs: the tensors of the model in diffusers

    Returns:
        None if the table lacks a tensor, or the model lacks a part of one
    """
    runs: dict[str, list[Run]] = {}
    for name in specs:
        found = _found(name, table)
        if found is None:
            return None
        row, original, parts = found
        if original in runs:
            continue
        if any(part not in specs for part in parts):
            return None
        runs[original] = [run for part in parts for run in _runs(row, specs[part])]
    return runs


def known_runs(table: Sequence[OriginalName], specs: Mapping[str, TensorSpec]) -> dict[str, list[Run]]:
    """Like `original_runs`, for the tensors that the table names; every matching row gives a name."""
    runs: dict[str, list[Run]] = {}
    for name in specs:
        for row in table:
            for original, parts in _matches(name, row):
                if original not in runs and all(part in specs for part in parts):
                    runs[original] = [run for part in parts for run in _runs(row, specs[part])]
    return runs


def diffusers_name(table: Sequence[OriginalName], name: str) -> str:
    """What diffusers calls a tensor of the model's own code, in a table that joins nothing; other names stay."""
    for row in table:
        found = _pattern(row.original).fullmatch(name)
        if found is not None:
            *block, rest = found.groups()
            return row.parts[0].format(*block) + rest
    return name


def _found(name: str, table: Sequence[OriginalName]) -> tuple[OriginalName, str, tuple[str, ...]] | None:
    """The first row for a tensor of diffusers, with the original tensor that it belongs to and its parts, if any."""
    return next(((row, *found) for row in table for found in _matches(name, row)), None)


def _matches(name: str, row: OriginalName) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The original tensors that a tensor of diffusers belongs to by a row, each with all its parts."""
    for part in row.parts:
        found = _pattern(part).fullmatch(name)
        if found is not None:
            *block, rest = found.groups()
            yield row.original.format(*block) + rest, tuple(other.format(*block) + rest for other in row.parts)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """Matches a module's tensors, or one tensor; groups the block's number, if there is one, and what follows."""
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + r"((?:\..+)?)")


def _runs(row: OriginalName, spec: TensorSpec) -> list[Run]:
    """The rows of a tensor of diffusers in the order in which the original tensor has them."""
    if row.is_turned:
        half = spec.shape[0] // 2
        return [Run(spec.name, half, spec.shape[0] - half), Run(spec.name, 0, half)]
    return [Run(spec.name, 0, spec.shape[0] if spec.shape else 1)]
