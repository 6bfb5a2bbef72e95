"""How much the maxima of layers still grow over the last prompts, which tells whether more prompts are needed."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping

__all__ = ["growth_of", "growth_report"]

logger = logging.getLogger(__name__)

#: The last prompts are one in so many of all.
PART = 4
LAYERS_SHOWN = 3
#: Growth below this is not worth a line.
LEAST = 0.001


def growth_of(maxima: Mapping[int, float], prompts: int) -> float | None:
    """The growth of a layer's maximum over the last quarter of the prompts, as a part of the maximum before.

    Args:
        maxima: number of the prompt, from 0 → largest magnitude of the layer's input
        prompts: the number of prompts

    Returns:
        None if there are fewer than four prompts, or the layer ran only in the last ones
    """
    first = prompts - prompts // PART
    before = max((amax for number, amax in maxima.items() if number < first), default=0.0)
    return max(maxima.values()) / before - 1 if first < prompts and before else None


def growth_report(growth: Mapping[str, float]) -> Iterator[str]:
    """Lines that sum up the growth of all layers, and name those that grow most; the log has every layer."""
    if not growth:
        return
    for name, ratio in growth.items():
        logger.info("%s: over the last quarter of the prompts, the largest input grew by %.2f %%", name, 100 * ratio)
    ordered = sorted(growth.items(), key=lambda entry: (-entry[1], entry[0]))
    growing = [entry for entry in ordered if entry[1] >= LEAST]
    yield (
        f"over the last quarter of the prompts, the largest input of {len(growing)} of {len(growth)} layers grew: "
        f"median of all {statistics.median(growth.values()):.1%}, most {ordered[0][1]:.1%}"
        + ("; more prompts make static scales safer" if growing else "")
    )
    yield from (f"{name}: largest input grew by {ratio:.1%}" for name, ratio in growing[:LAYERS_SHOWN])
