"""Writes a safetensors file whose tensors arrive in any order and in any pieces; its bytes are those of `save_file`.

All names, dtypes and shapes are known at the start, so the header is final and every byte has its place before the
first tensor is there. Only the length of the header, the first 8 bytes, waits for the end: a file that was never
finished is one that no reader opens.
"""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from omni_convert.formats.errors import OutputError
from omni_convert.formats.file_descriptor import FileDescriptor
from omni_convert.formats.safetensors_header import FORMAT_PT, LENGTH_BYTES, MAX_HEADER_BYTES, build_header, quoted
from omni_convert.formats.tensor_spec import TensorSpec

__all__ = ["SafetensorsWriter"]

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


class SafetensorsWriter:
    """A safetensors file that is being written; writes may come from several threads.

    As a context manager it finishes the file, unless it is left through an exception.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = FORMAT_PT) -> None:
        """Creates the file at its full size and writes the header.

        Raises:
            OutputError: the file exists, cannot be created, or the disk has no room for all of it.
        """
        self.path = path
        self._header, text = build_header(specs, metadata)
        if len(text) > MAX_HEADER_BYTES:
            raise OutputError(
                f"{path}: found a header of {len(text)} bytes, expected at most {MAX_HEADER_BYTES}; "
                "use a smaller --max-shard-size"
            )
        self._length = len(text).to_bytes(LENGTH_BYTES, "little")
        self._coverage = {name: _Coverage() for name in self._header.specs}
        self._lock = threading.Lock()
        self._written_twice: str | None = None
        self._descriptor: FileDescriptor | None = self._create()
        self._write_at(self._descriptor, memoryview(text), LENGTH_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
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
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        self._write(name, first_row * row_bytes, rows)

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
        self._write_at(descriptor, memoryview(self._length), 0)
        self._sync(descriptor)

    def _create(self) -> FileDescriptor:
        try:
            # Never over an existing file: it may be the one that is being read.
            number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be created ({error.strerror}), expected a new file; name another --output"
            ) from None
        descriptor = FileDescriptor(number)
        try:
            _preallocate(number, self._header.file_size)
        except OSError as error:
            raise self._output_error(error) from None
        return descriptor

    def _write(self, name: str, start: int, tensor: Tensor) -> None:
        descriptor = self._descriptor
        if descriptor is None:
            raise ValueError(f"{self.path}: tensor {quoted(name)} written after close")
        data = _bytes_of(tensor)
        if not len(data):
            return
        self._claim(name, start, start + len(data))
        self._write_at(descriptor, data, self._header.offsets[name] + start)
        with self._lock:
            self._coverage[name].written += len(data)

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
                raise self._output_error(error) from None

    def _sync(self, descriptor: FileDescriptor) -> None:
        try:
            os.fsync(descriptor.number)
        except OSError as error:
            raise self._output_error(error) from None

    def _output_error(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: cannot be written ({error.strerror}), expected room for {self._header.file_size} bytes; "
            "free some space or name another --output"
        )

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


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a copy only if it is elsewhere or laid out otherwise."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _mismatch(spec: TensorSpec, tensor: Tensor) -> str:
    given = f"{tensor.dtype} {list(tensor.shape)}"
    return f"tensor {quoted(spec.name)}: given {given}, declared {spec.dtype} {list(spec.shape)}"
