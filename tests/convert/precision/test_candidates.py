"""Choices beside the predicted one: none costs more, and each follows its rule."""

from __future__ import annotations

import pytest

from omni_convert.convert.precision.analysis import Analysis
from omni_convert.convert.precision.candidates import PREDICTED, candidates
from omni_convert.convert.precision.choice import Option, Unit, least_error, total

ROLES = ("attention.to_q", "feed_forward.w2")


def size(option: Option) -> float:
    return option.size


def table(small: str, large: str) -> Analysis:
    """Six blocks of two layers; errors grow towards the middle."""
    units = []
    for block in range(6):
        for weights, role in zip((100, 300), ROLES, strict=True):
            error = weights * (1 + min(block, 5 - block))
            options = (Option(small, error, weights // 2, 0.25), Option(large, error / 99, weights * 2, 1.0))
            name = f"layers.{block}.{role}"
            units.append(Unit("transformer", (name,), (name,), weights, options))
    return Analysis(tuple(units), 1.0, {}, "")


@pytest.mark.parametrize("limit", [1210, 1500, 2500, 4800])
def test_no_choice_costs_more(limit: float) -> None:
    analysis = table("nvfp4", "bf16")
    point = least_error(analysis.units, size, limit)
    assert point is not None
    found = candidates(analysis, point, size)
    assert next(iter(found)) == PREDICTED
    assert all(total(other.chosen, size) <= total(point.chosen, size) for other in found.values())
    assert len(set(map(str, found.values()))) == len(found)


def test_rules_fill_the_budget_in_their_order() -> None:
    analysis = table("nvfp4", "bf16")
    point = least_error(analysis.units, size, 1200 + 2 * 600 + 10)
    assert point is not None
    found = candidates(analysis, point, size)

    def kept(name: str) -> set[str]:
        chosen = zip(analysis.units, found[name].chosen, strict=True)
        return {unit.names[0] for unit, option in chosen if option.name == "bf16"}

    outer = kept("first and last blocks")
    assert {"layers.0.attention.to_q", "layers.0.feed_forward.w2", "layers.5.attention.to_q"} <= outer
    assert not any(name.startswith("layers.2") for name in outer)
    first = kept("layers.feed_forward.w2 first")
    assert sum(name.endswith("w2") for name in first) == 2


def test_mixtures_of_gguf_are_tried_where_they_fit() -> None:
    analysis = table("Q4_K", "Q6_K")
    largest = max(unit.weights for unit in analysis.units) * 100
    point = least_error(analysis.units, size, largest)
    assert point is not None
    mixture = candidates(analysis, point, size)["Q4_K_M"]
    same_size = least_error(analysis.units, size, mixture.size)
    assert same_size is not None
    assert mixture.size == same_size.size
    assert "Q4_K_M" in candidates(analysis, same_size, size)
    tight = least_error(analysis.units, size, 1210)
    assert tight is not None
    assert "Q4_K_M" not in candidates(analysis, tight, size)
