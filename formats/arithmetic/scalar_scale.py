"""Scales that are one number for a whole weight, or for its static activations."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.rows import InputStatistics, TensorLayout

__all__ = ["SCALAR", "scalars", "static_scale"]

SCALAR = TensorLayout(torch.float32, (), rows_per_entry=0)


def static_scale(inputs: InputStatistics | None, rule: str, largest: float) -> float:
    """The scale with which inputs fill a grid that ends at `largest`; 1 for inputs that are all 0.

    Args:
        rule: where to clip, see `InputStatistics.clip`
    """
    assert inputs is not None, "planning demands statistics for static activations"
    return inputs.clip(rule, largest) / largest or 1.0


def scalars(**numbers: float | None) -> dict[str, Tensor]:
    """Each number as a float32 [] tensor, by suffix; None is left out."""
    return {
        suffix: torch.tensor(number, dtype=torch.float32) for suffix, number in numbers.items() if number is not None
    }
