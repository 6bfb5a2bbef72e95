"""Reads a GGUF file as other files of weights are read: any rows of any tensor, its blocks as bytes."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import torch

from omni_convert.formats.containers.gguf_header import GgufEntry, GgufHeader, parse_gguf_header
from omni_convert.formats.containers.header import FileHeader
from omni_convert.formats.containers.open_file import OpenFile
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.tensor_spec import TensorSpec

__all__ = ["PLAIN_DTYPES", "GgufReader", "rows_together"]

#: Types whose numbers torch has.
PLAIN_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class GgufReader(TensorFile):
    """An open GGUF file; reads may come from several threads.

    `specs` has a tensor of blocks as U8 [rows / `rows_together`, bytes]; the rows are those of its first dimension.

    Attributes:
        entries: what the file says of each tensor
        architecture: `general.architecture`; None if it says none
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and checks its header; no tensor is read.

        Raises:
            CheckpointError: the file cannot be read, or is damaged in any way that the header shows.
        """
        opened = OpenFile(path)
        header = parse_gguf_header(opened.read, opened.size, path)
        self.entries = {entry.name: entry for entry in header.entries}
        architecture = header.values.get("general.architecture")
        self.architecture = architecture if isinstance(architecture, str) else None
        super().__init__(path, _file_header(header, opened.size), header.text, opened)


def _file_header(header: GgufHeader, file_size: int) -> FileHeader:
    return FileHeader(
        {entry.name: _spec(entry) for entry in header.entries},
        {entry.name: entry.begin for entry in header.entries},
        {key: value for key, value in header.values.items() if isinstance(value, str)},
        file_size,
    )


def rows_together(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Rows of the first dimension that fill whole blocks: 1, but where the file has rows of another length."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return int(block) // math.gcd(block, math.prod(shape[1:]))


def _spec(entry: GgufEntry) -> TensorSpec:
    if entry.type.name in PLAIN_DTYPES:
        return TensorSpec(entry.name, PLAIN_DTYPES[entry.type.name], entry.shape)
    entries = entry.shape[0] // rows_together(entry.type, entry.shape) if entry.shape else 1
    return TensorSpec(entry.name, torch.uint8, (entries, entry.nbytes // entries if entries else 0))
