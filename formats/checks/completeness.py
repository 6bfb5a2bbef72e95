"""Missing and superfluous tensors of a quantized checkpoint, judged by names; no weight is read, no model built."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from omni_convert.formats.checks.undeclared import holds_codes
from omni_convert.formats.checks.unlisted import shown_unlisted, unlisted_linears
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import CODES, COMPANIONS, WEIGHT
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import listed, nearest
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["Flaw", "Gap", "block_gaps", "gaps", "incomplete", "without_weight"]

LEAVES_SHOWN = 5


@dataclass(frozen=True)
class Flaw:
    """A tensor that is missing, or that belongs to nothing.

    Attributes:
        is_scale: it is the scale of codes, which vLLM-Omni leaves unset with a warning
    """

    reason: str
    is_scale: bool = False


def block_gaps(quantized: QuantizedCheckpoint, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Gap]:
    """Tensors that a block lacks, and its siblings have.

    Args:
        shapes: stem to [out, in] of the quantized layers, those that cannot be read included
    """
    if _is_container(quantized.dialect):
        return
    names = {stem: layer.stored.weight_name for stem, layer in quantized.layers.items()}
    codes = {names.get(stem, f"{stem}{WEIGHT}"): shape for stem, shape in shapes.items()}
    kept = {
        name: quantized.checkpoint[stored].shape
        for name, stored in quantized.kept.items()
        if name.rpartition(".")[2] not in COMPANIONS and name not in codes
    }
    yield from gaps({**codes, **kept}, codes)


def without_weight(checkpoint: Checkpoint, stem: str) -> str | None:
    """The tensors of a layer that has companions but no weight, as a message; None if it has a weight."""
    leaves = [name.removeprefix(f"{stem}.") for name in checkpoint if name.rpartition(".")[0] == stem]
    if any(leaf in CODES for leaf in leaves):
        return None
    shown = [leaf for leaf in leaves if leaf != "bias"]
    return f"found {listed(shown, LEAVES_SHOWN)} without a weight"


def incomplete(quantized: QuantizedCheckpoint, names: Mapping[str, str]) -> Flaw | None:
    """The first flaw of a checkpoint; None if its names show none.

    Args:
        names: see `unlisted_linears`
    """
    if quantized.dialect is None or _is_container(quantized.dialect):
        return None
    shapes = {stem: layer.shape for stem, layer in quantized.layers.items()}
    gap = next(block_gaps(quantized, shapes), None)
    if gap is not None:
        return Flaw(gap.reason)
    stray = next(filter(None, (_stray(quantized, name) for name in quantized.kept.values())), None)
    if (
        stray is None
        and not DIALECTS[quantized.dialect].fills_vllm_omni_parameters
        and (stems := unlisted_linears(quantized, names))
    ):
        return Flaw(f"found {shown_unlisted(stems)}")
    return stray


def _is_container(dialect: str | None) -> bool:
    """Whether names tell nothing more, since the container says what each tensor is."""
    return dialect is not None and DIALECTS[dialect].declared_by == "container"


def _stray(quantized: QuantizedCheckpoint, name: str) -> Flaw | None:
    """The flaw of a tensor that belongs to no quantized layer, or None."""
    assert quantized.dialect is not None
    is_strict = DIALECTS[quantized.dialect].fills_vllm_omni_parameters
    stem, _, leaf = name.rpartition(".")
    spec = quantized.checkpoint[name]
    if leaf in COMPANIONS:
        bare = without_weight(quantized.checkpoint, stem)
        if bare is not None:
            return Flaw(f"layer '{stem}': {bare}")
        what = f"found '{name}', which belongs to no quantized layer"
        return Flaw(what) if is_strict else None
    if is_strict and holds_codes(name, spec) and len(spec.shape) == 2:
        return Flaw(f"found '{name}' in {DTYPE_NAMES[spec.dtype]} without the scales that it needs", is_scale=True)
    return None


# The outermost number of a name; more digits would be no block's.
NUMBERED = re.compile(r"(.+?)\.(\d{1,4})\.(.+)")
# One block in so many may differ from the rest; in a shorter list, one.
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
    if not usual or count < 2 or len(numbers) - count > max(1, len(numbers) // ODD_IN):
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
    """Missing name → the similar name that is there instead; None for a block of another kind."""
    names: dict[str, str] = {}
    for extra, shape in found.items():
        if expected.get(extra) == shape:
            continue
        absent = [rest for rest in expected if rest not in found and rest not in names]
        near = nearest(extra, absent, SIMILARITY)
        # Only rows are compared: the columns of codes may be packed.
        if extra in expected or near is None or shape[:1] != expected[near][:1]:
            return None
        names[near] = extra
    return names
