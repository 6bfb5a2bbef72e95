"""Writes a file of tensors that arrive in any order and in any pieces, and hashes it meanwhile.

All names, dtypes and shapes are known at the start, so the header is final and every byte has its place before the
first tensor is there. Only the first 8 bytes, without which no reader opens the file, wait for the end: they are the
length of a safetensors header, or the magic and version of GGUF. An unfinished file can be taken up again where it was
left, by who knows which bytes are good.
"""

from __future__ import annotations

import errno
import os
import platform
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from omni_convert.formats.containers.hashing import Piece, WrittenHash, cannot_be_written
from omni_convert.formats.containers.header import FileHeader
from omni_convert.formats.containers.open_file import FileDescriptor
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import OutputError, quoted

__all__ = ["Container", "TensorWriter", "bytes_of"]

# So many new bytes are worth a write to the disk; with less to do at the end, `fsync` is quick.
WRITEBACK_BYTES = 64 << 20
NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class _Coverage:
    """Which bytes of one tensor have been claimed, as ascending ranges that do not touch, and how many are written."""

    def __init__(self) -> None:
        self.written = 0
        self._ranges: list[tuple[int, int]] = []

    def claim(self, start: int, stop: int) -> bool:
        """Takes a non-empty range; False if a byte of it is taken."""
        ranges = self._ranges
        at = bisect_left(ranges, (start, stop))
        before = ranges[at - 1] if at else (-1, -1)
        after = ranges[at] if at < len(ranges) else (stop + 1, stop + 1)
        if before[1] > start or after[0] < stop:
            return False
        joins_before, joins_after = before[1] == start, after[0] == stop
        joined = (before[0] if joins_before else start, after[1] if joins_after else stop)
        ranges[at - joins_before : at + joins_after] = [joined]
        return True


class TensorWriter:
    """A file of tensors that is being written; writes may come from several threads.

    As a context manager it finishes the file, unless it is left through an exception.
    """

    def __init__(
        self, path: Path, header: FileHeader, first: bytes, text: bytes, *, resume: bool = False, join: bool = False
    ) -> None:
        """Creates the file at its full size and writes the header.

        Args:
            path: the file
            header: all tensors that it will hold, ascending and apart by less than an alignment, and where
            first: the 8 bytes that make it readable
            text: what is between them and the tensors
            resume: keep the bytes of a file of this very header that is there, and replace any other; none of them
                counts as written until it is adopted
            join: write into a file of this very header that another process has created and will close

        Raises:
            OutputError: the file exists, cannot be created, or the disk has no room for all of it; there is none to
                join.
        """
        self.path = path
        self._header = header
        self._first = first
        self._coverage = {name: _Coverage() for name in self._header.specs}
        self._hash = WrittenHash(path, header, first, text)
        self._lock = threading.Lock()
        self._written_twice: str | None = None
        self._missing = sum(spec.nbytes for spec in self._header.specs.values())
        self._not_yet_on_disk = 0
        self._descriptor: FileDescriptor | None = None
        if join:
            self._descriptor = self._join(text)
        elif resume:
            self._descriptor = self._reopen(text)
        if self._descriptor is None:
            self._descriptor = self._create()
            self._write_at(self._descriptor, memoryview(text), len(self._first))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._hash.abandon()
        self._descriptor = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor at its place.

        Raises:
            OutputError: the disk is full or fails.
            ValueError: the tensor is not the declared one, or was written before.
        """
        spec = self._header.specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(_mismatch(spec, tensor))
        self._write(name, 0, tensor)

    def write_rows(self, name: str, first_row: int, rows: Tensor) -> None:
        """Writes rows of a tensor at their place.

        Raises:
            OutputError: the disk is full or fails.
            ValueError: the rows are not rows of the declared tensor, or were written before.
        """
        spec = self._header.specs[name]
        if not spec.shape or rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:] or not rows.dim():
            raise ValueError(_mismatch(spec, rows))
        if not 0 <= first_row <= spec.shape[0] - rows.shape[0]:
            raise ValueError(f"{_mismatch(spec, rows)} at row {first_row}")
        start, _ = self._extent(name, first_row, first_row)
        self._write(name, start, rows)

    @property
    def missing(self) -> int:
        """Bytes of tensors that are not written yet."""
        return self._missing

    def adopt(self, name: str, first_row: int, stop_row: int) -> None:
        """Counts rows of a tensor that an earlier run wrote as written; one without dimensions has one row."""
        start, stop = self._extent(name, first_row, stop_row)
        if stop > start:
            self._claim(name, start, stop)
            self._count(Piece(name, start, stop))

    def read_back(self, name: str, first_row: int, stop_row: int) -> bytes:
        """The bytes of rows of a tensor as they are in the file, whoever wrote them.

        Raises:
            OutputError: the disk fails.
        """
        start, stop = self._extent(name, first_row, stop_row)
        try:
            return os.pread(self._open_descriptor(name).number, stop - start, self._header.offsets[name] + start)
        except OSError as error:
            raise cannot_be_written(self.path, self._header, error) from None

    def hash_written(self) -> None:
        """Hashes what is there without a gap behind what was hashed before, unless another thread is at it.

        The bytes are read back for it, so that `checksum` can then tell whether the file holds what was meant.

        Raises:
            OutputError: the disk fails, or the header is not what was written.
        """
        self._hash.go_on()

    def sha256(self) -> str:
        """SHA-256 of the complete file, while it may still be closing; every tensor must be written.

        Raises:
            OutputError: the disk fails, or the header is not what was written.
        """
        self._check_complete()
        return self._hash.finish()

    def checksum(self, name: str, first_row: int, stop_row: int) -> int:
        """CRC-32 of rows that were written at once, or adopted, as they were found in the file when it was hashed."""
        start, stop = self._extent(name, first_row, stop_row)
        return self._hash.checksum(Piece(name, start, stop)) if stop > start else 0

    def detach(self) -> None:
        """Puts what was written on the disk and lets go of the file, unfinished.

        Raises:
            OutputError: the disk is full or fails.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._sync(descriptor)

    def close(self) -> None:
        """Finishes the file: from here on it can be read, and survives a power cut.

        Raises:
            OutputError: the disk is full or fails.
            RuntimeError: a byte was never written, or was written twice.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        self._check_complete()
        self._sync(descriptor)
        self._write_at(descriptor, memoryview(self._first), 0)
        self._sync(descriptor)

    def _reopen(self, text: bytes) -> FileDescriptor | None:
        """The file of an earlier run, unfinished again; None where there is none or another."""
        try:
            descriptor = FileDescriptor(os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
            size = os.fstat(descriptor.number).st_size
            if size == self._header.file_size and os.pread(descriptor.number, len(text), len(self._first)) == text:
                self._write_at(descriptor, memoryview(bytes(len(self._first))), 0)
                return descriptor
            self.path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise cannot_be_written(self.path, self._header, error) from None
        return None

    def _join(self, text: bytes) -> FileDescriptor:
        try:
            descriptor = FileDescriptor(os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
            if os.pread(descriptor.number, len(text), len(self._first)) == text:
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            raise cannot_be_written(self.path, self._header, error) from None
        raise OutputError(
            f"{self.path}: found no such file on {platform.node()}, where a part of the work runs, expected what "
            "another machine began; put the output on a file system that all machines share"
        )

    def _create(self) -> FileDescriptor:
        try:
            # Never over an existing file: it may be the one that is being read.
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be created ({error.strerror}), expected a new file; name another --output"
            ) from None
        descriptor = FileDescriptor(number)
        try:
            _preallocate(number, self._header.file_size)
        except OSError as error:
            raise cannot_be_written(self.path, self._header, error) from None
        return descriptor

    def _write(self, name: str, start: int, tensor: Tensor) -> None:
        descriptor = self._open_descriptor(name)
        data = bytes_of(tensor)
        if not len(data):
            return
        piece = Piece(name, start, start + len(data))
        self._claim(name, piece.start, piece.stop)
        self._write_at(descriptor, data, self._header.offsets[name] + start)
        if self._count(piece):
            descriptor.start_writeback()

    def _extent(self, name: str, first_row: int, stop_row: int) -> tuple[int, int]:
        """First byte of rows of a tensor, and the byte after the last."""
        spec = self._header.specs[name]
        row_bytes = spec.nbytes // max(1, spec.shape[0]) if spec.shape else spec.nbytes
        return first_row * row_bytes, stop_row * row_bytes

    def _open_descriptor(self, name: str) -> FileDescriptor:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: tensor {quoted(name)} used after close")
        return self._descriptor

    def _count(self, piece: Piece) -> bool:
        """Notes that bytes were written; whether enough of them wait for the disk."""
        size = piece.stop - piece.start
        with self._lock:
            self._hash.add(piece)
            self._coverage[piece.name].written += size
            self._missing -= size
            self._not_yet_on_disk += size
            is_enough = self._not_yet_on_disk >= WRITEBACK_BYTES
            if is_enough:
                self._not_yet_on_disk = 0
            return is_enough

    def _claim(self, name: str, start: int, stop: int) -> None:
        with self._lock:
            if self._coverage[name].claim(start, stop):
                return
            self._written_twice = name
        raise ValueError(f"{self.path}: tensor {quoted(name)}: bytes {start} to {stop} written twice")

    def _write_at(self, descriptor: FileDescriptor, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):  # one call moves at most 2 GiB, and less when the disk fills up
            try:
                done += os.pwrite(descriptor.number, data[done:], offset + done)
            except OSError as error:
                raise cannot_be_written(self.path, self._header, error) from None

    def _sync(self, descriptor: FileDescriptor) -> None:
        try:
            os.fsync(descriptor.number)
        except OSError as error:
            raise cannot_be_written(self.path, self._header, error) from None

    def _check_complete(self) -> None:
        if self._written_twice is not None:
            raise RuntimeError(f"{self.path}: tensor {quoted(self._written_twice)} was written twice")
        for name, spec in self._header.specs.items():
            missing = spec.nbytes - self._coverage[name].written
            if missing:
                raise RuntimeError(
                    f"{self.path}: tensor {quoted(name)}: {missing} of {spec.nbytes} bytes were never written"
                )


def _preallocate(number: int, size: int) -> None:
    """Claims the disk space at once, so that a full disk shows before hours of work do."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        try:
            os.posix_fallocate(number, 0, size)
        except OSError as error:
            if error.errno not in NO_PREALLOCATION:
                raise
        else:
            return
    os.ftruncate(number, size)


class Container(ABC):
    """A kind of file, and all that one says beside its tensors."""

    @abstractmethod
    def open_writer(
        self, path: Path, specs: Iterable[TensorSpec], *, resume: bool = False, join: bool = False
    ) -> TensorWriter:
        """The writer of a file with these tensors; `resume` and `join` as for `TensorWriter`.

        Raises:
            OutputError: the file exists, cannot be created, or the disk has no room for all of it; there is none to
                join.
        """

    @abstractmethod
    def size(self, specs: Iterable[TensorSpec]) -> int:
        """The bytes of a whole file with these tensors."""

    @abstractmethod
    def check(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        """Reads the header of a finished file back.

        Raises:
            CheckpointError: the file holds other tensors than these.
        """


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a copy only if it is elsewhere or laid out otherwise."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _mismatch(spec: TensorSpec, tensor: Tensor) -> str:
    given = f"{tensor.dtype} {list(tensor.shape)}"
    return f"tensor {quoted(spec.name)}: given {given}, declared {spec.dtype} {list(spec.shape)}"
