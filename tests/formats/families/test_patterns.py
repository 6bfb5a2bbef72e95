"""The meaning of a layer pattern, and the message for one that matches nothing."""

from __future__ import annotations

import pytest

from omni_convert.formats.families.patterns import matches, suggestion_for

NAMES = tuple(
    f"{stack}.{number}.{leaf}"
    for stack in ("layers", "noise_refiner")
    for number in range(12)
    for leaf in ("attention.to_q", "attention.to_out.0", "feed_forward.w1")
)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("layer.1*", "layers.1*"),
        ("layers.1.atention", "layers.1.attention"),
        ("*.atention.to_*", "*.attention.to_*"),
        ("nois_refiner.0.feedforward.w1", "noise_refiner.0.feed_forward.w1"),
        ("feed_foward", "feed_forward"),
        ("layers.99.attention.to_q", "layers.9.attention.to_q"),
    ],
)
def test_a_mistyped_pattern_is_told_the_nearest_that_matches(pattern: str, meant: str) -> None:
    assert not any(matches(pattern, name) for name in NAMES)
    assert suggestion_for(pattern, NAMES) == f"; did you mean '{meant}'?"
    assert any(matches(meant, name) for name in NAMES)


def test_what_is_like_no_name_is_told_nothing() -> None:
    assert suggestion_for("xyz*", NAMES) == ""
