"""llama.cpp's importance matrices: for each weight, the mean square of each of its input channels.

GGUF:   tensors NAME.weight.in_sum2 F32 [matrices, in] and NAME.weight.counts F32 [matrices, 1]; the importance is
        their quotient, and 1 where nothing was counted
legacy: number of entries; for each entry the length of its name, the name, a number of calls, a number of values, and
        these values as F32, which are the importance times the number of calls; all numbers are I32, little-endian

Files of stable-diffusion.cpp name tensors of a diffusion model with `model.diffusion_model.` before them.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from omni_convert.formats.containers.gguf_file import GgufReader
from omni_convert.formats.containers.gguf_header import MAGIC
from omni_convert.formats.containers.open_file import OpenFile
from omni_convert.formats.errors import CheckpointError, OutputError, quoted

__all__ = ["read_imatrix", "write_imatrix"]

SUMS, COUNTS = ".in_sum2", ".counts"
PREFIX = "model.diffusion_model."
REMEDY = "record it again, or leave --imatrix out"
MAX_NAME_BYTES = 4096


def read_imatrix(path: Path) -> dict[str, Tensor]:
    """The importance of the input channels of each weight, float32 [in], by the name of the weight's tensor.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds a number that is no mean square.
    """
    file = OpenFile(path)
    entries = _read_gguf(path) if file.size > 4 and file.read(0, 4) == MAGIC else _read_legacy(file)
    for name, importance in entries.items():
        if not bool((importance.isfinite() & (importance >= 0)).all()):
            raise CheckpointError(f"{path}: {quoted(name)}: found numbers below 0, infinite or NaN; {REMEDY}")
    return {name.removeprefix(PREFIX): importance for name, importance in entries.items()}


def _read_gguf(path: Path) -> dict[str, Tensor]:
    entries = {}
    with GgufReader(path) as file:
        for name in file.specs:
            if not name.endswith(SUMS):
                continue
            weight = name.removesuffix(SUMS)
            counts = f"{weight}{COUNTS}"
            if counts not in file.specs:
                raise CheckpointError(f"{path}: found {quoted(name)} without {quoted(counts)}; {REMEDY}")
            sums, count = file.read(name).float(), file.read(counts).float().flatten()
            if sums.numel() != sums.shape[-1] or len(count) != 1:
                continue  # of experts, which no layer here has
            entries[weight] = torch.where(count == 0, 1.0, sums.flatten() / count)
    if not entries:
        raise CheckpointError(f"{path}: found no tensor called NAME{SUMS}, expected an importance matrix; {REMEDY}")
    return entries


def _read_legacy(file: OpenFile) -> dict[str, Tensor]:
    position = 0

    def take(count: int, limit: int) -> bytes:
        nonlocal position
        if not 0 <= count <= limit or position + count > file.size:
            raise CheckpointError(f"{file.path}: found no importance matrix at byte {position}; {REMEDY}")
        position += count
        return file.read(position - count, position)

    def number() -> int:
        return int(struct.unpack("<i", take(4, 4))[0])

    entries = {}
    for _ in range(number()):
        name = take(number(), MAX_NAME_BYTES).decode("utf-8", "replace")
        calls, values = number(), number()
        numbers = torch.from_numpy(np.frombuffer(take(4 * values, file.size), "<f4").astype(np.float32))
        entries[name] = numbers / calls if calls > 0 else torch.ones_like(numbers)
    return entries


def write_imatrix(path: Path, entries: Mapping[str, tuple[Tensor, int]], dataset: str, chunks: int) -> None:
    """Writes a file in the GGUF form, which appears only when it is complete.

    Args:
        entries: name of each weight's tensor → mean square of its input channels, float32 [in], and number of tokens
        dataset: name of the prompts
        chunks: number of prompts

    Raises:
        OutputError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    writer = gguf.GGUFWriter(partial, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 1)
    for name, (importance, tokens) in sorted(entries.items()):
        writer.add_tensor(f"{name}{SUMS}", (importance.double() * tokens).float()[None].numpy())
        writer.add_tensor(f"{name}{COUNTS}", np.full((1, 1), tokens, dtype=np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OutputError(f"{path}: the importance matrix cannot be written ({error.strerror})") from None
