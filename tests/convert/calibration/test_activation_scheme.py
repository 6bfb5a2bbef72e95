"""What is said about statistics that a method has no use for."""

from __future__ import annotations

from pathlib import Path

from omni_convert.convert.calibration.activation_scheme import choose_activation_scheme
from omni_convert.convert.recipe import Recipe


def test_a_budget_uses_statistics_whatever_the_method_does() -> None:
    statistics = (Path("statistics"),)
    assert "were not used" in choose_activation_scheme("int8", Recipe("int8", calibration=statistics)).note
    assert not choose_activation_scheme("int8", Recipe("int8", calibration=statistics, target_bits=6)).note
