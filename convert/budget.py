"""Budgets: what a conversion may cost or spoil, for which formats are then mixed. Importing it needs no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from omni_convert.formats.errors import RecipeError

__all__ = ["BUDGETS", "KEPT", "BudgetOptions", "format_size", "parse_size"]

#: Stands among formats for layers that stay as they are.
KEPT = "bf16"
#: The fields that set a budget; a recipe has at most one of them.
BUDGETS = ("target_size", "target_noise", "target_bits", "target_speed")
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[kMG]?B)")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """The budget of a mixture of formats, and what it may consist of.

    Attributes:
        target_size: bytes of the converted components' files of weights, as in `12GB`, where GB is 10^9
        target_noise: noise ratio of the images, see `Analysis`
        target_bits: mean stored bits of the weights of layers that may be quantized
        target_speed: time of the linears' matrix products over that in BF16
        formats: to choose from: methods, or types of GGUF, and `bf16`; empty for those that the dialect mixes
        analysis: the table that `omni-convert analyze` stored
        trial: prompts with which several choices are run, to take the one that changes images least
    """

    target_size: str | None = None
    target_noise: float | None = None
    target_bits: float | None = None
    target_speed: float | None = None
    formats: tuple[str, ...] = ()
    analysis: Path | None = None
    trial: Path | None = None

    @property
    def budget(self) -> str | None:
        """The option that sets the budget, as the user wrote it; None if there is none."""
        name = self._budgets[0] if self._budgets else None
        return None if name is None else f"--{name.replace('_', '-')} {getattr(self, name)}"

    @property
    def _budgets(self) -> list[str]:
        return [name for name in BUDGETS if getattr(self, name) is not None]

    def check_budget(self) -> None:
        """Raises RecipeError if there are several budgets, or if one is not a positive number."""
        names = [f"--{name.replace('_', '-')}" for name in self._budgets]
        if len(names) > 1:
            raise RecipeError(f"{names[1]}: found with {names[0]}, expected one budget")
        for name, option in zip(self._budgets, names, strict=True):
            value = getattr(self, name)
            if name == "target_size":
                parse_size(value)
            elif not (math.isfinite(value) and value > 0):
                raise RecipeError(f"{option}: found {value}, expected a positive number")


def parse_size(text: str) -> int:
    """The bytes of a size such as `12GB`.

    Raises:
        RecipeError: it is not one.
    """
    match = SIZE.fullmatch(text.strip())
    size = round(float(match["number"]) * UNITS[match["unit"]]) if match else 0
    if not size:
        raise RecipeError(f"--target-size: found '{text[:40]}', expected a size such as 12GB or 900MB")
    return size


def format_size(size: int) -> str:
    """A size as `parse_size` reads it, rounded up to a hundredth of its unit."""
    unit = next(unit for unit in ("GB", "MB", "kB", "B") if size >= UNITS[unit] or unit == "B")
    hundredths = -(-size * 100 // UNITS[unit])
    return f"{hundredths / 100:g}{unit}"
