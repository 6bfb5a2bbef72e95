"""A GGUF file whose tensors arrive in any order and in any pieces; see `formats/containers/writer.py`.

magic, version, counts │ key-values │ name, shape, type and offset of each tensor │ tensors, each at a multiple of 32

The header is spelled by the `gguf` package itself. It reverses shapes; more than four dimensions are written as they
are, which its reader, diffusers' and ComfyUI-GGUF's take.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch

from omni_convert.formats.containers.header import FileHeader
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.containers.writer import Container, TensorWriter
from omni_convert.formats.errors import CheckpointError, quoted

__all__ = ["GgufFile", "GgufWriter"]

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
FIRST_BYTES = 8  # magic and version
QUANTIZATION_VERSION = 2
# Types that have another name where a file says what most of its tensors are.
FILE_TYPES = {"MXFP4": "MXFP4_MOE", "Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S"}
TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class GgufFile(Container):
    """Everything that a GGUF file holds beside its tensors' bytes.

    Attributes:
        architecture: `general.architecture`
        file_type: the type that most quantized tensors have, or the name of a mixture
        quantized: quantized tensor → its type and shape; the others have the type of their dtype
        notes: further key-values, which no reader needs
    """

    architecture: str
    file_type: str
    quantized: Mapping[str, tuple[str, tuple[int, ...]]]
    notes: Mapping[str, str | int] = field(default_factory=dict)

    def entry(self, spec: TensorSpec) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]:
        """Name, shape and type in the file.

        Raises:
            CheckpointError: GGUF has no such type.
        """
        name = spec.name
        if name in self.quantized:
            kind, shape = self.quantized[name]
            return name, shape, gguf.GGMLQuantizationType[kind]
        if spec.dtype not in TYPE_NAMES:
            raise CheckpointError(
                f"tensor {quoted(spec.name)}: found {spec.dtype}, expected a type that GGUF has "
                f"({', '.join(TYPE_NAMES.values())})"
            )
        return name, spec.shape or (1,), gguf.GGMLQuantizationType[TYPE_NAMES[spec.dtype]]

    def open_writer(
        self, path: Path, specs: Iterable[TensorSpec], *, resume: bool = False, join: bool = False
    ) -> GgufWriter:
        return GgufWriter(path, specs, self, resume=resume, join=join)

    def size(self, specs: Iterable[TensorSpec]) -> int:
        return _build_header(list(specs), self)[0].file_size

    def check(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        """Reads the header back with the `gguf` package's reader.

        Raises:
            CheckpointError: it reads other tensors.
        """
        planned = {}
        for spec in specs:
            name, shape, kind = self.entry(spec)
            planned[name] = (tuple(reversed(shape)), kind, spec.nbytes)
        found = {
            tensor.name: (tuple(tensor.shape.tolist()), tensor.tensor_type, tensor.n_bytes)
            for tensor in gguf.GGUFReader(path).tensors
        }
        if found != planned:
            differing = sorted({*found.items()} ^ {*planned.items()})
            raise CheckpointError(
                f"{path}: found other tensors than planned, first {differing[0][0]}; please report this"
            )


class GgufWriter(TensorWriter):
    """A GGUF file that is being written."""

    def __init__(
        self, path: Path, specs: Iterable[TensorSpec], content: GgufFile, *, resume: bool = False, join: bool = False
    ) -> None:
        """Creates the file at its full size and writes the header.

        Args:
            path: the file
            specs: all tensors that it will hold, in their order there; quantized ones as bytes
            content: what else it says
            resume: as of `TensorWriter`
            join: as of `TensorWriter`

        Raises:
            OutputError: as of `TensorWriter`.
            CheckpointError: GGUF has no such type.
        """
        header, text = _build_header(list(specs), content)
        super().__init__(path, header, text[:FIRST_BYTES], text[FIRST_BYTES:], resume=resume, join=join)


def _build_header(specs: list[TensorSpec], content: GgufFile) -> tuple[FileHeader, bytes]:
    """Where everything is, and all bytes before the first tensor."""
    writer = gguf.GGUFWriter(None, content.architecture)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(gguf.LlamaFileType[_file_type(content.file_type)])
    for key, value in content.notes.items():
        writer.add_key_value(
            key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        )
    for spec in specs:
        name, shape, kind = content.entry(spec)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), spec.nbytes, raw_dtype=kind)
    stream = io.BytesIO()
    writer.fout, writer.state = [stream], gguf.gguf_writer.WriterState.EMPTY  # opened, as for a file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    text = stream.getvalue()
    text += bytes(-len(text) % ALIGNMENT)
    offsets, position = {}, len(text)
    for spec in specs:
        offsets[spec.name] = position
        position += spec.nbytes + -spec.nbytes % ALIGNMENT
    return FileHeader({spec.name: spec for spec in specs}, offsets, {}, position), text


def _file_type(type_name: str) -> str:
    return f"MOSTLY_{FILE_TYPES.get(type_name, type_name)}"
