"""Samples the rows with the smallest hashes, so that the sample does not depend on the order of the rows.

The hash depends only on a row's bits. So samples can be merged and sampled again, and equal rows count once. Each row
knows the run that it comes from, a prompt and a denoising step: rows of one prompt resemble each other, which counts
where choices are judged. Of equal rows the one with the smallest run is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["hash_words", "merged_rows", "pack_rows", "smallest_hashes"]

VALUES_PER_WORD = 4


def pack_rows(rows: Tensor) -> Tensor:
    """bfloat16 [rows, in] as 64-bit words, int64 [rows, ceil(in / 4)], padded with zeros; a view if possible."""
    padding = -rows.shape[1] % VALUES_PER_WORD
    if padding:
        rows = F.pad(rows, (0, padding))
    elif not rows.is_contiguous() or rows.storage_offset() % VALUES_PER_WORD:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.int64)


def hash_words(words: Tensor) -> Tensor:
    """The hash of each row of 64-bit words, int64 [rows].

    The hash is a sum of products with odd random coefficients, modulo 2^64. Each word is folded first: otherwise its
    upper bits, which hold the fourth value, would affect only the upper bits of the sum.
    """
    folded = words >> 29
    folded ^= words
    folded *= _coefficients(words.shape[1], words.device)
    return folded.sum(1)


def smallest_hashes(hashes: Tensor, limit: int, runs: Tensor | None = None) -> Tensor:
    """Positions of the `limit` smallest distinct hashes, in ascending order of the hash, int64 [<= limit].

    Args:
        runs: prompt and step of each, int64 [rows, 2]; the smallest decides between equal hashes, else the position
    """
    positions = torch.arange(len(hashes), device=hashes.device)
    for keys in () if runs is None else (runs[:, 1], runs[:, 0]):
        positions = positions[keys[positions].sort(stable=True).indices]
    ordered, order = hashes[positions].sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return positions[order][is_first][:limit]


def merged_rows(parts: Sequence[tuple[Tensor, Tensor | None]], limit: int) -> tuple[Tensor, Tensor | None]:
    """The sample of several samples, and its runs if all parts know theirs.

    Args:
        parts: rows, bfloat16 [<= limit, in], and their runs, int64 [<= limit, 2]
    """
    rows, known = torch.cat([part for part, _ in parts]), [runs for _, runs in parts if runs is not None]
    runs = torch.cat(known) if len(known) == len(parts) else None
    kept = smallest_hashes(hash_words(pack_rows(rows)), limit, runs)
    return rows[kept], None if runs is None else runs[kept]


@lru_cache(maxsize=64)
def _coefficients(count: int, device: torch.device) -> Tensor:
    """The odd multipliers of a row of `count` words, from SplitMix64 started at zero (Steele, Lea and Flood, 2014)."""
    values = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return (torch.from_numpy(values.view(np.int64)) | 1).to(device)
