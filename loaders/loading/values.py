"""Checks the values of a checkpoint's quantized layers before any of them is used.

A model on a CPU stays mapped, and its pages are read when they are first needed. Looking for NaN through the mapping
would cost a page fault every few kilobytes, which is more than reading. So several threads read the files with plain
I/O, into buffers that stay in cache.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from omni_convert.formats.arithmetic.e8m0 import E8M0_NAN
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError

__all__ = ["check_stored_values"]

# Bytes that a thread checks at a time: few enough for the cache, and enough to hide Python's overhead.
PIECE = 4 << 20
MAX_THREADS = 8
E4M3_NAN = 0x7F

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True)
class _Piece:
    """Bytes `start` to `stop` of a tensor."""

    file: TensorFile
    spec: TensorSpec
    start: int
    stop: int


class _Buffer(threading.local):
    """A buffer for each thread."""

    def __init__(self) -> None:
        self.elements = np.empty(PIECE, np.uint8)


def check_stored_values(checkpoint: Checkpoint, names: Collection[str], where: str) -> None:
    """Refuses codes that are NaN, which kernels that shift bits would read as numbers, and impossible scales.

    Args:
        checkpoint: open, in safetensors
        names: tensors of its quantized layers, as the files name them
        where: the checkpoint, for messages

    Raises:
        CheckpointError: a code is NaN, a scale is not a finite number or negative, or a tensor cannot be read.
    """
    buffer = _Buffer()
    pieces = [piece for file in checkpoint.files.values() for piece in _pieces(file, set(names))]
    with ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads())) as pool:
        results = pool.map(lambda piece: _is_sound(piece, buffer), pieces)
        for piece, is_sound in zip(pieces, results, strict=True):
            if not is_sound:
                pool.shutdown(wait=False, cancel_futures=True)
                raise CheckpointError(f"{where}: {piece.spec.name} holds {_complaint(piece.spec)}; convert again")


def _pieces(file: TensorFile, names: set[str]) -> Iterator[_Piece]:
    """The pieces to check, in the order of the file."""
    for spec in file.specs.values():
        is_code_of_any_value = _is_code(spec) and spec.dtype is not torch.float8_e4m3fn
        if spec.name in names and not is_code_of_any_value:
            for start in range(0, spec.nbytes, PIECE):
                yield _Piece(file, spec, start, min(start + PIECE, spec.nbytes))


def _is_code(spec: TensorSpec) -> bool:
    return "scale" not in spec.name.rpartition(".")[2]


def _complaint(spec: TensorSpec) -> str:
    if _is_code(spec):
        return "NaN, expected finite weights"
    return "NaN, Inf or a negative number, expected scales"


def _is_sound(piece: _Piece, buffer: _Buffer) -> bool:
    values = buffer.elements[: piece.stop - piece.start]
    piece.file.read_into(piece.spec.name, piece.start, values.data)
    if _is_code(piece.spec):
        # 0x7F is the largest of signed bytes, 0xFF of unsigned ones: nothing is copied.
        return bool(values.view(np.int8).max() != E4M3_NAN and values.max() != E4M3_NAN | 0x80)
    if piece.spec.dtype is torch.uint8:
        return bool(values.max() != E8M0_NAN)
    return _are_scales(values, piece.spec.dtype)


def _are_scales(values: Bytes, dtype: torch.dtype) -> bool:
    if dtype is torch.float8_e4m3fn and values.max() < E4M3_NAN:
        return True  # -0 alone is larger
    numbers = torch.from_numpy(values).view(dtype).float()
    return bool(((numbers >= 0) & (numbers < torch.inf)).all())
