"""Reads a safetensors file: the header first and completely checked, then any rows of any tensor.

Bytes go straight into tensors of their own (`preadv`): nothing stays mapped, and a read takes the memory of what it
returns. The format itself is in `safetensors_header.py`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from omni_convert.formats.errors import CheckpointError, quoted
from omni_convert.formats.file_descriptor import FileDescriptor
from omni_convert.formats.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, parse_header
from omni_convert.formats.tensor_spec import TensorSpec

__all__ = ["SafetensorsFile"]

GIT_LFS_POINTER = b"version "


class SafetensorsFile:
    """An open safetensors file; reads may come from several threads.

    Attributes:
        path: the file
        size: its bytes
        specs: its tensors by name, in the order of their bytes
        metadata: the free text in its header
        header_sha256: identity of its header, in hex
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and checks its header; no tensor is read.

        Raises:
            CheckpointError: the file cannot be read, or is damaged in any way that the header shows.
        """
        self.path = path
        descriptor = _open(path)
        self.size = os.fstat(descriptor.number).st_size
        self._load_header(descriptor)
        self._descriptor: FileDescriptor | None = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., SafetensorsFile], tuple[type[SafetensorsFile], Path, str, int]]:
        """Another process opens the file itself."""
        return _open_again, (type(self), self.path.absolute(), self.header_sha256, self.size)

    def finished(self, name: str, nbytes: int) -> None:
        """Notes that so many more bytes of a tensor are not needed any more.

        The system forgets a tensor of which all bytes are: a model that is read once leaves the memory of the machine
        to others, and new memory costs more than memory that has just become free.
        """
        self._unfinished[name] -= nbytes
        if nbytes and not self._unfinished[name] and self._descriptor is not None:
            self._descriptor.wont_need(self._offsets[name], self.specs[name].nbytes)

    def on_disk(self) -> Path:
        """The whole file."""
        return self.path

    def release(self) -> None:
        """Gives up the place on the disk of a file that does not stay there."""

    def close(self) -> None:
        """Lets go of the file; reads that are under way finish."""
        self._descriptor = None

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        spec = self.specs[name]
        return self._read_tensor(self._offsets[name], spec, spec.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor with at least one dimension.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        spec = self.specs[name]
        if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
            raise IndexError(f"rows {start} to {stop} of tensor {quoted(name)} with shape {list(spec.shape)}")
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        return self._read_tensor(self._offsets[name] + start * row_bytes, spec, (stop - start, *spec.shape[1:]))

    def read_bytes(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a tensor.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        buffer = bytearray(stop - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills a buffer of bytes with those of a tensor that begin at `start`.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        if not 0 <= start <= start + len(buffer) <= self.specs[name].nbytes:
            raise IndexError(f"bytes {start} to {start + len(buffer)} of tensor {quoted(name)}")
        self._read_into(self._open_descriptor(), buffer, self._offsets[name] + start)

    def prefetch(self, name: str, limit: int) -> None:
        """Has the system read a tensor, at most `limit` bytes of it, while we do something else."""
        self._open_descriptor().will_need(self._offsets[name], min(limit, self.specs[name].nbytes))

    def _read_tensor(self, offset: int, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=spec.dtype)
        self._read_into(self._open_descriptor(), tensor.reshape(-1).view(torch.uint8).numpy().data, offset)
        return tensor

    def _open_descriptor(self) -> FileDescriptor:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: read after close")
        return self._descriptor

    def _read_into(self, descriptor: FileDescriptor, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):  # one call moves at most 2 GiB
            try:
                count = os.preadv(descriptor.number, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
            if not count:
                raise CheckpointError(
                    f"{self.path}: found its end at byte {offset + done}, expected {self.size} bytes; "
                    "it was changed while it was read, start again"
                )
            done += count

    def _load_header(self, descriptor: FileDescriptor) -> None:
        self._take_header(self._read_header(descriptor))

    def _take_header(self, text: bytes) -> None:
        header = parse_header(text, self.size, self.path)
        self.specs: dict[str, TensorSpec] = header.specs
        self.metadata: dict[str, str] = header.metadata
        self.header_sha256 = hashlib.sha256(text).hexdigest()
        self._offsets = header.offsets
        self._unfinished = {name: spec.nbytes for name, spec in header.specs.items()}

    def _read_header(self, descriptor: FileDescriptor) -> bytes:
        """The JSON of the header."""
        prefix = bytearray(min(LENGTH_BYTES, self.size))
        self._read_into(descriptor, memoryview(prefix), 0)
        if prefix == GIT_LFS_POINTER:
            raise CheckpointError(f"{self.path}: found a Git LFS pointer, expected the weights; run `git lfs pull`")
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= MAX_HEADER_BYTES or self.size < LENGTH_BYTES:
            raise CheckpointError(
                f"{self.path}: found a header of {length} bytes in a file of {self.size}, expected 2 to "
                f"{MAX_HEADER_BYTES}; this is no complete safetensors file"
            )
        if LENGTH_BYTES + length > self.size:
            raise CheckpointError(
                f"{self.path}: found {self.size} bytes, expected a header of {length}; the file is truncated, "
                "download or write it again"
            )
        text = bytearray(length)
        self._read_into(descriptor, memoryview(text), LENGTH_BYTES)
        return bytes(text)


def _open_again(kind: type[SafetensorsFile], path: Path, header_sha256: str, size: int) -> SafetensorsFile:
    """The file that another process has open.

    Raises:
        CheckpointError: it is not there, or another.
    """
    file = kind(path)
    if (file.header_sha256, file.size) != (header_sha256, size):
        raise CheckpointError(
            f"{path}: found another file than the one that the work began with, expected the same on every machine; "
            "put the model on a file system that all of them share"
        )
    return file


def _open(path: Path) -> FileDescriptor:
    try:
        # Opening a pipe would wait for its writer without O_NONBLOCK; regular files ignore the flag.
        descriptor = FileDescriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except (OSError, ValueError) as error:  # ValueError: the name holds a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be opened ({reason}), expected a safetensors file") from None
    if not stat.S_ISREG(os.fstat(descriptor.number).st_mode):
        raise CheckpointError(f"{path}: found a folder or device, expected a safetensors file")
    return descriptor
