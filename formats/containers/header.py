"""The contents of the header of a weights file, in any container."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni_convert.formats.containers.tensor_spec import TensorSpec

__all__ = ["MAX_HEADER_BYTES", "FileHeader"]

#: The limit of safetensors, which an honest header of GGUF does not reach either.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class FileHeader:
    """The contents of a header.

    Attributes:
        specs: tensors by name, in the order of their bytes
        offsets: first byte of each tensor, counted from the start of the file
        metadata: free text that travels with the tensors
        file_size: bytes of the whole file
    """

    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    metadata: dict[str, str]
    file_size: int
