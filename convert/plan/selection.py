"""Which layers of a component are quantized, which stay, and why: one rule, whoever reads the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from omni_convert.convert.plan.steps import matrix_shape
from omni_convert.convert.plan.target import Scope, Target
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches, suggestion_for

__all__ = ["Selection", "check_patterns", "choose_layers"]


@dataclass(frozen=True)
class Selection:
    """The layers of a target that are quantized, and those that stay, each with the reason.

    Attributes:
        scope: the layers that there were to choose from
        names: every name that a pattern may give one of these
    """

    scope: Scope
    names: frozenset[str]
    chosen: tuple[LayerGroup, ...]
    kept: tuple[tuple[LayerGroup, str], ...]


def choose_layers(target: Target) -> Selection:
    """Decides for every group of a target's scope; a group stays as a whole if one of its members has to.

    Raises:
        RecipeError: the target accepts none of the layers, or nothing is left to quantize.
        CheckpointError: the model is quantized in a way that nobody here reads, or a member of a group is missing.
    """
    target.component.refuse_unread()
    scope = target.scope()
    patterns = (*target.recipe.ignored_layers, *scope.patterns)
    chosen: list[LayerGroup] = []
    kept: list[tuple[LayerGroup, str]] = []
    for group in scope.groups:
        reason = group.keep_reason or _ignored(_names(target, group), patterns)
        if reason is None and target.is_kept_by_choice(group):
            reason = f"BF16 by {target.recipe.budget}"
        reason = reason or _unsupported(group, target)
        if reason is None:
            chosen.append(group)
        else:
            kept.append((group, reason))
    chosen, kept = _whole_stacks(chosen, kept)
    if not chosen:
        raise RecipeError(
            f"{target.component.config_path}: every layer is ignored or unsupported; nothing is left to quantize with "
            f"{target.method} (the first: {kept[0][1]}){_other_dialects(target, kept)}"
        )
    names = {*scope.others, *(name for group in scope.groups for name in _names(target, group))}
    return Selection(scope, frozenset(names), tuple(chosen), tuple(kept))


def _whole_stacks(
    chosen: Sequence[LayerGroup], kept: Sequence[tuple[LayerGroup, str]]
) -> tuple[list[LayerGroup], list[tuple[LayerGroup, str]]]:
    """The same choice without stacks of experts that are quantized in part: these stay as a whole."""
    partial = {group.stack: group.members[0] for group, _ in reversed(kept) if group.stack is not None}
    left = [
        (group, f"the runtime builds it together with '{partial[group.stack]}', which stays")
        for group in chosen
        if group.stack in partial
    ]
    return [group for group in chosen if group.stack not in partial], [*kept, *left]


def check_patterns(recipe: Recipe, selections: Iterable[Selection]) -> None:
    """Raises RecipeError if a pattern of the recipe matches no layer of any component."""
    names = {name for selection in selections for name in selection.names}
    for pattern in recipe.ignored_layers:
        if not any(matches(pattern, name) for name in names):
            raise RecipeError(f"--ignored-layers: '{pattern}' matches no layer{suggestion_for(pattern, names)}")


def _names(target: Target, group: LayerGroup) -> tuple[str, ...]:
    """Every name that a pattern may give a group."""
    return group.runtime_name, *group.members, *target.written_group(group).members


def _ignored(names: Sequence[str], patterns: Sequence[str]) -> str | None:
    pattern = next((each for each in patterns if any(matches(each, name) for name in names)), None)
    return f"ignored by '{pattern}'" if pattern is not None else None


def _other_dialects(target: Target, kept: Sequence[tuple[LayerGroup, str]]) -> str:
    """The remedy for layers that other dialects could hold; empty if it would be none."""
    unsupported = next((group for group, reason in kept if _unsupported(group, target) == reason), None)
    if unsupported is None or target.dialect.name not in WRITTEN:
        return ""
    shape = matrix_shape(target.weights[f"{target.written_group(unsupported).members[0]}{WEIGHT}"])
    fmt = target.format_of(unsupported)
    holding = [name for name in WRITTEN if not isinstance(DIALECTS[name].spelling(fmt, shape), str)]
    if not holding or fmt.unsupported(*shape) or target.dialect.name in holding:
        return ""
    return f"; --dialect {' or '.join(holding)} can hold it"


def _unsupported(group: LayerGroup, target: Target) -> str | None:
    """Why the format or the dialect cannot hold a member of the group, or None."""
    recipe = target.recipe
    for stem in target.written_group(group).members:
        spec = target.weights[f"{stem}{WEIGHT}"]
        if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
            return f"found {DTYPE_NAMES[spec.dtype]} weights, expected F32, F16 or BF16"
        rows, columns = matrix_shape(spec)
        fmt = target.format_of(group)
        spelling = target.dialect.spelling(fmt, (rows, columns))
        reason = fmt.unsupported(rows, columns) or (spelling if isinstance(spelling, str) else None)
        if reason is not None:
            return reason
        if group.is_fused and recipe.weight_block_size is not None and recipe.runtime == "vllm-omni":
            width = rows if len(group.members) > 1 else rows // 2
            if width % recipe.weight_block_size[0]:
                return f"a fused width of {width} does not divide into blocks of {recipe.weight_block_size[0]} rows"
    return None
