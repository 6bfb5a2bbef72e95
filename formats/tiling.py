"""Quantizing in tiles that stay in cache, on all cores that torch was given.

Every step of a quantizer is a pass over memory, so a whole weight at a time would run at the speed of memory, once per
step. Threads that each take a tile through all steps also wait for each other once, not at every step as torch's do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Barrier

import torch
from torch import Tensor

__all__ = ["quantize_in_tiles"]

# A float32 tile of this size and its scratch fit the second-level cache of one core; on an accelerator a launch costs
# more than a cache miss.
CPU_TILE_ELEMENTS = 1 << 17
ACCELERATOR_TILE_ELEMENTS = 1 << 26


def quantize_in_tiles(rows: Tensor, quantize_tile: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Applies a function to tiles of whole rows of [rows, in], and joins the tensors that it returns by row."""
    if rows.device.type != "cpu":
        return _quantize_tiles(torch.split(rows, _tile_rows(rows, ACCELERATOR_TILE_ELEMENTS)), quantize_tile)
    tiles = torch.split(rows, _tile_rows(rows, CPU_TILE_ELEMENTS))
    threads = torch.get_num_threads()
    if threads == 1 or len(tiles) == 1:
        return _quantize_tiles(tiles, quantize_tile)
    shares = [tiles[len(tiles) * share // threads : len(tiles) * (share + 1) // threads] for share in range(threads)]
    run = partial(_quantize_tiles, quantize_tile=quantize_tile)
    executor = _executor(os.getpid(), threads)
    return executor.submit(_join, list(executor.map(run, [share for share in shares if share]))).result()


def _tile_rows(rows: Tensor, elements: int) -> int:
    return max(1, elements // max(1, rows.shape[1]))


def _quantize_tiles(tiles: Sequence[Tensor], quantize_tile: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    return _join([quantize_tile(tile) for tile in tiles])


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


@lru_cache(maxsize=1)
def _executor(process: int, threads: int) -> ThreadPoolExecutor:  # noqa: ARG001  # a fork has no threads
    """Threads in each of which torch uses one core."""
    executor = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
    started = Barrier(threads)
    list(executor.map(_use_one_core, [started] * threads))
    torch.set_num_threads(threads)  # the last call also counts for threads yet to come, which are not ours
    return executor


def _use_one_core(started: Barrier) -> None:
    torch.get_num_threads()  # takes over the setting of the process, which torch would else do at the first operation
    torch.set_num_threads(1)
    started.wait()  # so that no thread does this twice and another never
