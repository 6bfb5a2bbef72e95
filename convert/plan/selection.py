"""Which layers of a component are quantized, which are left alone, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_convert.convert.recipe import Recipe
from omni_convert.formats.arithmetic.mx import COARSE_BLOCK
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches, suggestion_for
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.fp8_storage import Fp8Storage
from omni_convert.formats.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.table import FORMATS, FormatOptions

__all__ = ["choose_layers", "format_for", "hardware_notes", "other_linears", "reasons_to_keep", "recommendation_notes"]

# What diffusers calls the main stack of blocks; refiners and single-stream blocks come after it.
MAIN_STACK = re.compile(r"(?:blocks|layers|transformer_blocks)\.(\d+)\.")


def choose_layers(
    family: Family, checkpoint: Checkpoint, where: Path, config: Mapping[str, Any], method: str, recipe: Recipe
) -> tuple[list[LayerGroup], list[tuple[LayerGroup, str]]]:
    """Groups to quantize, and groups that the runtime could run quantized but that stay, each with the reason.

    Args:
        where: what to name in errors

    Raises:
        RecipeError: the runtime runs nothing of this family, a pattern matches nothing, or nothing is left.
        CheckpointError: a member of a fused group is missing.
    """
    if not recipe.force:
        _refuse(family, where, config, method, recipe)
    groups = family.layer_groups(checkpoint, recipe.runtime)
    if not groups:
        raise RecipeError(f"{where}: found no layer of {family.name} that {recipe.runtime} runs quantized")
    patterns = list(recipe.ignored_layers)
    if recipe.recommended:
        patterns += [recommendation.pattern for recommendation in family.recommended_ignored(method)]
    grouped = {stem for group in groups for stem in group.members}
    reasons = reasons_to_keep(patterns, groups, other_linears(checkpoint, grouped))
    leading = family.bf16_blocks(method) if recipe.bf16_blocks is None else recipe.bf16_blocks
    if recipe.bf16_blocks and all(_block_number(group) >= leading for group in groups):
        raise RecipeError(
            f"--bf16-blocks: found {leading}, but none of the layers that {recipe.runtime} runs quantized is in one of "
            "the first blocks; name layers with --ignored-layers"
        )
    chosen: list[LayerGroup] = []
    kept: list[tuple[LayerGroup, str]] = []
    for group in groups:
        reason = (
            group.keep_reason
            or reasons.get(group.runtime_name)
            or (f"one of the first {leading} blocks" if _block_number(group) < leading else None)
            or _unsupported(group, checkpoint, method, recipe)
        )
        if reason is None:
            chosen.append(group)
        else:
            kept.append((group, reason))
    if not chosen:
        raise RecipeError(
            f"{where}: every layer is ignored or unsupported; nothing is left to quantize with {method} (the first: "
            f"{kept[0][1]})"
        )
    return chosen, kept


def other_linears(tensors: Mapping[str, TensorSpec], stems: Collection[str] = ()) -> list[str]:
    """Matrices that are none of these layers, by name."""
    return [
        name.removesuffix(".weight")
        for name, spec in tensors.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and name.removesuffix(".weight") not in stems
    ]


def _refuse(family: Family, where: Path, config: Mapping[str, Any], method: str, recipe: Recipe) -> None:
    """Raises where the runtime cannot run the result, or nobody should."""
    refusal = family.unsupported(recipe.runtime, method)
    if refusal is not None:
        raise RecipeError(f"{where}: {refusal}; --runtime diffusers is for our loader, --force converts all the same")
    refusal = family.refused_variant(config, method)
    if refusal is not None:
        raise RecipeError(f"{where}: {refusal}; choose another method, or --force")


def _block_number(group: LayerGroup) -> float:
    """The number of a group's block in the model's main stack; infinite elsewhere."""
    match = MAIN_STACK.match(group.runtime_name)
    return int(match[1]) if match else math.inf


def recommendation_notes(family: Family, method: str, recipe: Recipe) -> list[str]:
    """What is recommended for the family and was not asked for."""
    if recipe.recommended:
        return []
    return [
        f"recommended for {family.name}: --ignored-layers '{recommendation.pattern}' ({recommendation.reason}); "
        "--recommended applies it"
        for recommendation in family.recommended_ignored(method)
    ]


def hardware_notes(chosen: Iterable[LayerGroup], checkpoint: Checkpoint, method: str) -> list[str]:
    """What of the result nobody has run yet."""
    if method != Mxfp4DualScale.method:
        return []
    widths = {checkpoint[f"{group.members[0]}.weight"].shape[1] for group in chosen}
    short = sorted(width for width in widths if width % COARSE_BLOCK)
    if not short:
        return []
    return [
        f"in_features {', '.join(map(str, short))}: no multiple of {COARSE_BLOCK}, so the last coarse scale of a row "
        "covers fewer; stored as vLLM-Omni allocates it, not run on hardware yet"
    ]


def format_for(
    method: str, recipe: Recipe, group: LayerGroup, checkpoint: Mapping[str, TensorSpec], *, calibrated: bool
) -> QuantizingFormat:
    """The format of a group's weights.

    Args:
        calibrated: there are statistics of the group's inputs, and the method uses them
    """
    if method == Fp8Storage.method:
        return Fp8Storage().for_weight(checkpoint[f"{group.members[0]}.weight"].shape)
    return FORMATS[method].build(
        FormatOptions(
            static=calibrated,
            smooth=calibrated,
            input_scale_rule=recipe.input_scale,
            weight_block_size=recipe.weight_block_size,
            per_channel=not calibrated and DIALECTS[recipe.dialect].is_dynamic_fp8_per_row,
            shared_in_group=group.is_fused and recipe.int8_fused_scales == "shared",
            scale_rule=recipe.scale_rule,
            search=recipe.search,
            group_size=recipe.group_size,
            gguf_type=recipe.gguf_type,
        )
    )


def _unsupported(group: LayerGroup, checkpoint: Checkpoint, method: str, recipe: Recipe) -> str | None:
    """Why the format cannot take a group, asked member by member."""
    for stem in group.members:
        spec = checkpoint[f"{stem}.weight"]
        if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
            return f"found {DTYPE_NAMES[spec.dtype]} weights, expected F32, F16 or BF16"
        out_features, in_features = spec.shape
        fmt = format_for(method, recipe, group, checkpoint, calibrated=False)
        spelling = DIALECTS[recipe.dialect].spelling(fmt, (out_features, in_features))
        reason = fmt.unsupported(out_features, in_features) or (spelling if isinstance(spelling, str) else None)
        if reason is not None:
            return reason
        if group.is_fused and recipe.weight_block_size is not None and recipe.runtime == "vllm-omni":
            width = out_features if len(group.members) > 1 else out_features // 2
            if width % recipe.weight_block_size[0]:
                return f"a fused width of {width} does not divide into blocks of {recipe.weight_block_size[0]} rows"
    return None


def reasons_to_keep(
    patterns: Sequence[str], groups: Iterable[LayerGroup], other_layers: Iterable[str]
) -> dict[str, str]:
    """Runtime name of every group that a pattern matches, with the reason to show.

    A fused group is kept whole when any member matches: a runtime cannot load half of one.

    Args:
        patterns: what the user asked to leave alone
        groups: layers that would be quantized
        other_layers: layers that stay as they are anyhow; a pattern may name them, to no effect

    Raises:
        RecipeError: a pattern matches no layer of the checkpoint.
    """
    reasons: dict[str, str] = {}
    names_of = {group.runtime_name: (group.runtime_name, *group.members) for group in groups}
    every_name = {name for names in names_of.values() for name in names} | set(other_layers)
    for pattern in patterns:
        for runtime_name, names in names_of.items():
            if any(matches(pattern, name) for name in names):
                reasons.setdefault(runtime_name, f"ignored by '{pattern}'")
        if not any(matches(pattern, name) for name in every_name):
            raise RecipeError(f"--ignored-layers: '{pattern}' matches no layer{suggestion_for(pattern, every_name)}")
    return reasons
