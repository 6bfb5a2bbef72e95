"""Assigns one of several formats to each layer of an unquantized model, by a table of names."""

from __future__ import annotations

from collections.abc import Sequence

from omni_convert.formats.config import MIXED, QuantizationConfig
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches, suggestion_for

__all__ = ["requested_configs"]


def requested_configs(config: QuantizationConfig, groups: Sequence[LayerGroup]) -> list[QuantizationConfig | None]:
    """The configuration that a request has for each group of layers; None for groups that it does not list.

    A name in the table matches as in `ignored_layers`. A layer's own name takes precedence over patterns, and the first
    pattern over later ones.

    Raises:
        RecipeError: a name matches no layer, or members of a group that a runtime fuses would differ.
    """
    if config.method != MIXED:
        return [config] * len(groups)
    names = [name for group in groups for name in (group.runtime_name, *group.members)]
    for pattern, _ in config.layers:
        if not any(matches(pattern, name) for name in names):
            raise RecipeError(
                f"quantized_layers: '{pattern}' matches no layer of the model{suggestion_for(pattern, names)}"
            )
    return [_of_group(config, group) for group in groups]


def _of_group(config: QuantizationConfig, group: LayerGroup) -> QuantizationConfig | None:
    requested = [_of_names(config, (stem, group.runtime_name)) for stem in group.members]
    if any(each != requested[0] for each in requested):
        members = ", ".join(group.members)
        raise RecipeError(
            f"quantized_layers: {members} are fused by runtimes, found several algorithms for them, expected one"
        )
    return requested[0]


def _of_names(config: QuantizationConfig, names: Sequence[str]) -> QuantizationConfig | None:
    exact = (found for name, found in config.layers if name in names)
    by_pattern = (found for pattern, found in config.layers if any(matches(pattern, name) for name in names))
    return next(exact, None) or next(by_pattern, None)
