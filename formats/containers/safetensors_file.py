"""Reads a safetensors file: the header first and completely checked, then any rows of any tensor.

The format itself is in `safetensors_header.py`.
"""

from __future__ import annotations

from pathlib import Path

from omni_convert.formats.containers.header import MAX_HEADER_BYTES
from omni_convert.formats.containers.open_file import OpenFile
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.safetensors_header import LENGTH_BYTES, parse_header
from omni_convert.formats.errors import CheckpointError

__all__ = ["SafetensorsFile"]

GIT_LFS_POINTER = b"version "


class SafetensorsFile(TensorFile):
    """An open safetensors file; reads may come from several threads."""

    def __init__(self, path: Path) -> None:
        """Opens a file and checks its header; no tensor is read.

        Raises:
            CheckpointError: the file cannot be read, or is damaged in any way that the header shows.
        """
        opened = OpenFile(path)
        text = _header_text(opened)
        super().__init__(path, parse_header(text, opened.size, path), text, opened)


def _header_text(file: OpenFile) -> bytes:
    """The JSON of the header."""
    prefix = file.read(0, min(LENGTH_BYTES, file.size))
    if prefix == GIT_LFS_POINTER:
        raise CheckpointError(f"{file.path}: found a Git LFS pointer, expected the weights; run `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES or file.size < LENGTH_BYTES:
        raise CheckpointError(
            f"{file.path}: found a header of {length} bytes in a file of {file.size}, expected 2 to "
            f"{MAX_HEADER_BYTES}; this is no complete safetensors file"
        )
    if LENGTH_BYTES + length > file.size:
        raise CheckpointError(
            f"{file.path}: found {file.size} bytes, expected a header of {length}; the file is truncated, "
            "download or write it again"
        )
    return file.read(LENGTH_BYTES, LENGTH_BYTES + length)
