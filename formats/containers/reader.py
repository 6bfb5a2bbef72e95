"""The interface of a reader of weights, in any container: it reads any rows and bytes of any tensor.

A read takes only the memory of its result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from omni_convert.formats.containers.header import FileHeader
from omni_convert.formats.containers.open_file import OpenFile
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError, quoted

__all__ = ["TensorFile"]


class TensorFile:
    """An open file of tensors; reads may come from several threads.

    A container's own class opens a path and reads the header there.

    Attributes:
        path: the file
        size: its bytes
        specs: its tensors by name, in the order of their bytes
        metadata: the free text in its header
        header_sha256: identity of its header, in hex
    """

    def __init__(self, path: Path, header: FileHeader, text: bytes, opened: OpenFile | None) -> None:
        """A file whose header was read.

        Args:
            path: the file
            header: what it says
            text: its bytes
            opened: the file; None for one that is opened when a tensor is read
        """
        self.path = path
        self.size = header.file_size
        self.specs = header.specs
        self.metadata = header.metadata
        self.header_sha256 = hashlib.sha256(text).hexdigest()
        self._offsets = header.offsets
        self._unfinished = {name: spec.nbytes for name, spec in header.specs.items()}
        self._bytes_left = sum(self._unfinished.values())
        self._at_end: Callable[[TensorFile], None] | None = None
        self._opened = opened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., TensorFile], tuple[type[TensorFile], Path, str, int]]:
        """Another process opens the file itself."""
        return _open_again, (type(self), self.path.absolute(), self.header_sha256, self.size)

    def at_end(self, act: Callable[[TensorFile], None]) -> None:
        """Has something done with the whole file once all tensors are finished; it stays where it is until then."""
        self._at_end = act

    def finished(self, name: str, nbytes: int) -> None:
        """Notes that so many more bytes of a tensor are not needed any more.

        The system forgets a tensor of which all bytes are: a model that is read once leaves the memory of the machine
        to others, and new memory costs more than memory that has just become free.
        """
        self._unfinished[name] -= nbytes
        self._bytes_left -= nbytes
        if self._at_end is None:
            self._forget(name)
        elif nbytes and not self._bytes_left:
            self._at_end(self)

    def _forget(self, name: str) -> None:
        """Lets go of what the system has in memory of a tensor, if nobody needs it any more."""
        size = self.specs[name].nbytes
        if size and not self._unfinished[name] and self._opened is not None:
            self._opened.descriptor.wont_need(self._offsets[name], size)

    def on_disk(self) -> Path:
        """The whole file."""
        return self.path

    def release(self) -> None:
        """Gives up the place on the disk of a file that does not stay there."""

    def close(self) -> None:
        """Lets go of the file; reads that are under way finish."""
        self._opened = None

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
        self._file().read_into(buffer, self._offsets[name] + start)

    def offset(self, name: str) -> int:
        """Where the bytes of a tensor begin in the file."""
        return self._offsets[name]

    def prefetch(self, name: str, limit: int) -> None:
        """Has the system read a tensor, at most `limit` bytes of it, while we do something else."""
        self._file().descriptor.will_need(self._offsets[name], min(limit, self.specs[name].nbytes))

    def _read_tensor(self, offset: int, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=spec.dtype)
        self._file().read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, offset)
        return tensor

    def _file(self) -> OpenFile:
        if self._opened is None:
            raise ValueError(f"{self.path}: read after close")
        return self._opened


def _open_again(kind: Callable[[Path], TensorFile], path: Path, header_sha256: str, size: int) -> TensorFile:
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
