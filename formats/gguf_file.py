"""Reads a GGUF file as other files of weights are read: any rows of any tensor, its blocks as bytes."""

from __future__ import annotations

import hashlib
import math

import gguf
import torch

from omni_convert.formats.file_descriptor import FileDescriptor
from omni_convert.formats.gguf_header import GgufEntry, parse_gguf_header
from omni_convert.formats.safetensors_file import SafetensorsFile
from omni_convert.formats.tensor_spec import TensorSpec

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


class GgufReader(SafetensorsFile):
    """An open GGUF file; reads may come from several threads.

    `specs` has a tensor of blocks as U8 [rows / `rows_together`, bytes]; the rows are those of its first dimension.

    Attributes:
        entries: what the file says of each tensor
        architecture: `general.architecture`; None if it says none
    """

    def _load_header(self, descriptor: FileDescriptor) -> None:
        def read(start: int, stop: int) -> bytes:
            buffer = bytearray(stop - start)
            self._read_into(descriptor, memoryview(buffer), start)
            return bytes(buffer)

        header = parse_gguf_header(read, self.size, self.path)
        self.entries = {entry.name: entry for entry in header.entries}
        architecture = header.values.get("general.architecture")
        self.architecture = architecture if isinstance(architecture, str) else None
        self.specs = {name: _spec(entry) for name, entry in self.entries.items()}
        self.metadata = {key: str(value) for key, value in header.values.items() if isinstance(value, str)}
        self.header_sha256 = hashlib.sha256(header.text).hexdigest()
        self._offsets = {name: entry.begin for name, entry in self.entries.items()}
        self._unfinished = {name: spec.nbytes for name, spec in self.specs.items()}


def rows_together(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Rows of the first dimension that fill whole blocks: 1, but where the file has rows of another length."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return int(block) // math.gcd(block, math.prod(shape[1:]))


def _spec(entry: GgufEntry) -> TensorSpec:
    if entry.type.name in PLAIN_DTYPES:
        return TensorSpec(entry.name, PLAIN_DTYPES[entry.type.name], entry.shape)
    entries = entry.shape[0] // rows_together(entry.type, entry.shape) if entry.shape else 1
    return TensorSpec(entry.name, torch.uint8, (entries, entry.nbytes // entries if entries else 0))
