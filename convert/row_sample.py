"""A sample of rows that does not depend on the order in which rows are seen: those with the smallest hashes.

The hash is a function of a row's bits alone. So the sample of a union is the sample of the samples' union, and equal
rows count once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["hash_words", "pack_rows", "smallest_hashes"]

VALUES_PER_WORD = 4
# The finalizer and the increment of SplitMix64 (Steele, Lea and Flood, 2014).
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def pack_rows(rows: Tensor) -> Tensor:
    """bfloat16 [rows, in] as 64-bit words, int64 [rows, ceil(in / 4)], padded with zeros. A view where it can be."""
    padding = -rows.shape[1] % VALUES_PER_WORD
    if padding:
        rows = F.pad(rows, (0, padding))
    elif not rows.is_contiguous() or rows.storage_offset() % VALUES_PER_WORD:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.int64)


def hash_words(words: Tensor) -> Tensor:
    """One hash for each row of 64-bit words, int64 [rows].

    A sum of products with odd random coefficients, modulo 2^64, then mixed. Each word is folded before: otherwise its
    upper bits, the fourth value's, would reach only the upper bits of the sum.
    """
    folded = words >> 29
    folded ^= words
    folded *= _coefficients(words.shape[1]).to(words.device)
    return _mix(folded.sum(1))


def smallest_hashes(hashes: Tensor, limit: int) -> Tensor:
    """Positions of the `limit` smallest different hashes, in ascending order of the hash; int64 [<= limit]."""
    ordered, positions = hashes.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return positions[is_first][:limit]


def _mix(values: Tensor) -> Tensor:
    for multiplier, shift in ((MIX_1, 30), (MIX_2, 27)):
        values = (values ^ _shift_right(values, shift)) * _signed(multiplier)
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own copies the sign."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


@lru_cache(maxsize=64)
def _coefficients(count: int) -> Tensor:
    """The odd multipliers of a row of `count` words: SplitMix64's sequence from zero."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    return _mix(torch.from_numpy(state.view(np.int64))) | 1
