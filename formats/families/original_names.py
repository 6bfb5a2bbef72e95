"""Names of tensors in a model's own code, which ComfyUI and stable-diffusion.cpp expect.

One tensor there may consist of several of diffusers', stacked along the rows, and its halves may have changed places.
Blocks of codes along the columns, such as GGUF's, move with their rows, so that joining changes no value.

Source: diffusers' conversions of single files (`loaders/single_file_utils.py`), the other way round.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import Run, TensorSpec

__all__ = [
    "CutLayer",
    "OriginalName",
    "OriginalTensor",
    "diffusers_name",
    "diffusers_runs",
    "is_of_diffusers_alone",
    "joined",
    "known_runs",
    "names_of",
    "original_tensors",
    "parts_of",
    "renamed",
    "same",
]

#: The row of a modulation whose second half is the first in diffusers: always, or where it is scale and shift alone.
Turned = Literal["always", "alone"]


@dataclass(frozen=True)
class OriginalName:
    """A module or a tensor of the model's own code; `{}` stands for a block's number.

    Attributes:
        original: its name
        parts: the diffusers module or tensor that it is, or those that it joins, in order
        turned: its second half is the first in diffusers (scale and shift of a modulation); None if it never is
        shape: its shape there, where that is another; -1 stands for all of its elements
        beside: a tensor of diffusers without which it has another name
    """

    original: str
    parts: tuple[str, ...]
    turned: Turned | None = None
    shape: tuple[int, ...] | None = None
    beside: str | None = None


@dataclass(frozen=True)
class CutLayer:
    """A layer of diffusers whose columns other code holds as two layers; `{}` stands for a block's number.

    Attributes:
        layer: its name
        first: the layer with as many of its columns as it has rows
        rest: the layer with the other columns, and the bias
    """

    layer: str
    first: str
    rest: str

    def parts_of(self, stem: str) -> tuple[str, str] | None:
        """The two parts of a layer of this name; None for other layers."""
        numbers = _numbers(self.layer, stem)
        return None if numbers is None else (self.first.format(*numbers), self.rest.format(*numbers))

    def layer_of(self, part: str) -> tuple[str, int] | None:
        """The layer of which a layer of this name is a part, and 0 for the first part; None for other layers."""
        found = [_numbers(name, part) for name in (self.first, self.rest)]
        places = ((self.layer.format(*numbers), i) for i, numbers in enumerate(found) if numbers is not None)
        return next(places, None)


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the model's own code.

    Attributes:
        runs: the rows of diffusers' tensors that it consists of
        shape: its own
    """

    runs: list[Run]
    shape: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of diffusers of which it holds rows."""
        return tuple(dict.fromkeys(run.source for run in self.runs))


def renamed(names: Mapping[str, str], original: str = "", diffusers: str = "") -> tuple[OriginalName, ...]:
    """Rows for modules that only have another name: original to diffusers', each below the prefix given."""
    return tuple(OriginalName(original + theirs, (diffusers + ours,)) for theirs, ours in names.items())


def same(*names: str) -> tuple[OriginalName, ...]:
    """Rows for names that do not differ."""
    return tuple(OriginalName(name, (name,)) for name in names)


def joined(original: str, parent: str, *parts: str) -> OriginalName:
    """The row for a tensor that stacks several of diffusers'."""
    return OriginalName(original, tuple(f"{parent}.{part}" for part in parts))


def original_tensors(
    table: Sequence[OriginalName], specs: Mapping[str, TensorSpec]
) -> dict[str, OriginalTensor] | None:
    """Original name → tensor.

    Args:
        table: rows of the model; where several match, the first one counts
        specs: the tensors of the model in diffusers

    Returns:
        None if the table lacks a tensor, or the model lacks a part of one
    """
    tensors: dict[str, OriginalTensor] = {}
    for name in specs:
        found = _found(name, table, specs)
        if found is None:
            return None
        row, original, parts = found
        if original in tensors:
            continue
        if any(part not in specs for part in parts):
            return None
        tensors[original] = _tensor(row, parts, specs)
    return tensors


def known_runs(table: Sequence[OriginalName], specs: Mapping[str, TensorSpec]) -> dict[str, list[Run]]:
    """Original name → the rows of diffusers' tensors, for each name that a row of the table gives."""
    return {name: tensor.runs for name, tensor in _known_tensors(table, specs).items()}


def diffusers_runs(
    table: Sequence[OriginalName], specs: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec]
) -> dict[str, list[Run]] | None:
    """Diffusers' name → the rows of stored tensors of which the tensor consists.

    Args:
        table: rows of the model; a tensor may have the name that any of them gives
        specs: the tensors of the model in diffusers
        stored: tensors by their original names

    Returns:
        None if a tensor of the model is not there, or has another size
    """
    pieces: dict[str, list[tuple[int, Run]]] = {}
    for name, tensor in _known_tensors(table, specs).items():
        spec = stored.get(name)
        if spec is None or not _is_of_size(spec, tensor.shape) or not pieces.keys().isdisjoint(tensor.sources):
            continue
        if len(tensor.runs) == 1:
            pieces[tensor.runs[0].source] = [(0, Run(name, 0, _rows(spec.shape)))]
            continue
        first = 0
        for run in tensor.runs:
            pieces.setdefault(run.source, []).append((run.start, Run(name, first, run.count)))
            first += run.count
    if pieces.keys() != specs.keys():
        return None
    return {name: [run for _, run in sorted(pieces[name], key=lambda piece: piece[0])] for name in specs}


def names_of(table: Sequence[OriginalName], name: str) -> Iterator[str]:
    """Every original tensor that holds a tensor of diffusers, or a part of it."""
    return (original for row in table for original, _ in _matches(name, row))


def parts_of(table: Sequence[OriginalName], name: str) -> tuple[str, ...]:
    """The tensors or modules of diffusers that one of the model's own code joins; () if no row gives its name."""
    for row in table:
        found = _pattern(row.original).fullmatch(name)
        if found is not None:
            *block, rest = found.groups()
            return tuple(part.format(*block) + rest for part in row.parts)
    return ()


def is_of_diffusers_alone(table: Sequence[OriginalName], name: str) -> bool:
    """Whether diffusers has a tensor of this name in a model whose own code has none."""
    is_of_diffusers = any(_pattern(part).fullmatch(name) for row in table for part in row.parts)
    return is_of_diffusers and not any(_pattern(row.original).fullmatch(name) for row in table)


def diffusers_name(table: Sequence[OriginalName], name: str) -> str:
    """The name in diffusers of a tensor of the model's own code, by a table that joins nothing; other names stay."""
    for row in table:
        found = _pattern(row.original).fullmatch(name)
        if found is not None:
            *block, rest = found.groups()
            return row.parts[0].format(*block) + rest
    return name


def _found(
    name: str, table: Sequence[OriginalName], specs: Mapping[str, TensorSpec]
) -> tuple[OriginalName, str, tuple[str, ...]] | None:
    """The first row for a tensor of diffusers, with the original tensor that it belongs to and its parts, if any."""
    rows = (row for row in table if row.beside is None or row.beside in specs)
    return next(((row, *found) for row in rows for found in _matches(name, row)), None)


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


def _numbers(name: str, stem: str) -> tuple[str, ...] | None:
    """The block's number in the name of a module, if it has one; None for the name of another."""
    found = _pattern(name).fullmatch(stem)
    return None if found is None or found.groups()[-1] else found.groups()[:-1]


def _known_tensors(table: Sequence[OriginalName], specs: Mapping[str, TensorSpec]) -> dict[str, OriginalTensor]:
    tensors: dict[str, OriginalTensor] = {}
    for name in specs:
        for row in table:
            for original, parts in _matches(name, row):
                if original not in tensors and all(part in specs for part in parts):
                    tensors[original] = _tensor(row, parts, specs)
    return tensors


def _tensor(row: OriginalName, parts: Sequence[str], specs: Mapping[str, TensorSpec]) -> OriginalTensor:
    runs = [run for part in parts for run in _runs(row, specs[part], specs)]
    first = specs[parts[0]]
    if row.shape is not None:
        return OriginalTensor(runs, tuple(first.elements if size == -1 else size for size in row.shape))
    return OriginalTensor(runs, (sum(run.count for run in runs), *first.shape[1:]) if first.shape else ())


def _runs(row: OriginalName, spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> list[Run]:
    """The rows of a tensor of diffusers in the order in which the original tensor has them."""
    if row.turned == "always" or (row.turned == "alone" and _is_scale_and_shift(spec, specs)):
        half = spec.shape[0] // 2
        return [Run(spec.name, half, spec.shape[0] - half), Run(spec.name, 0, half)]
    return [Run(spec.name, 0, _rows(spec.shape))]


def _is_scale_and_shift(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether the modulation of this weight or bias has two rows for each of its inputs, and so no gate."""
    weight = specs[f"{spec.name.rpartition('.')[0]}{WEIGHT}"]
    return weight.shape[0] == 2 * weight.shape[1]


def _is_of_size(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return spec.elements == math.prod(shape) and _rows(spec.shape) == _rows(shape)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1
