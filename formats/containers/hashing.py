"""Hashes a file of tensors while it is written: whatever lies without a gap behind what was hashed before.

The bytes are read back for it: a hash of what should have been written would not tell what the disk made of it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from omni_convert.formats.containers.header import FileHeader
from omni_convert.formats.containers.open_file import FileDescriptor
from omni_convert.formats.errors import OutputError

__all__ = ["Piece", "WrittenHash", "cannot_be_written"]

READ_BLOCK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes of a tensor that were written, or adopted, at once."""

    name: str
    start: int
    stop: int


class WrittenHash:
    """The hash of a file, as far as it is written; threads may add to it and go on with it."""

    def __init__(self, path: Path, header: FileHeader, first: bytes, text: bytes) -> None:
        """Begins with the bytes that are known before they are there.

        Args:
            path: the file
            header: where its tensors are
            first: the bytes that are written last
            text: what is between them and the tensors
        """
        self._path = path
        self._header = header
        self._data = len(first) + len(text)
        self._text_checksum = zlib.crc32(text)
        self._header_checksum: int | None = None
        self._jumps = _jumps(header)
        self._pieces: dict[int, Piece] = {}  # those that are there and not hashed, by their first byte in the file
        self._checksums: dict[Piece, int] = {}
        self._lock = threading.Lock()
        self._digest = hashlib.sha256(first)
        self._position = len(first)
        self._block: memoryview | None = None  # only while the file is being hashed: there may be hundreds of files
        self._is_abandoned = False

    def add(self, piece: Piece) -> None:
        """Notes that bytes are there."""
        self._pieces[self._header.offsets[piece.name] + piece.start] = piece

    def abandon(self) -> None:
        """Has whoever is hashing stop with a ValueError."""
        self._is_abandoned = True

    def go_on(self) -> None:
        """Hashes what can be hashed now, unless another thread is at it.

        Raises:
            OutputError: the disk fails, or the header is not what was written.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._hash_written()
            finally:
                self._lock.release()

    def finish(self) -> str:
        """SHA-256 of the file, of which every tensor was added; raises as `go_on`."""
        with self._lock:
            self._hash_written()
            if self._pieces:  # an earlier call failed in the middle of one
                raise self._changed("bytes that could not be read back", "every byte")
            self._hash_up_to(self._header.file_size)
            self._block = None
        return self._digest.hexdigest()

    def checksum(self, piece: Piece) -> int:
        """CRC-32 of bytes that were hashed."""
        return self._checksums[piece]

    def _hash_written(self) -> None:
        if self._position < self._data:
            self._header_checksum = self._hash_up_to(self._data)
        if self._header_checksum != self._text_checksum:
            raise self._changed("another header", "the one that was written")
        while (piece := self._pieces.get(start := self._next_byte())) is not None:
            self._hash_up_to(start)
            self._checksums[piece] = self._hash_up_to(self._header.offsets[piece.name] + piece.stop)
            del self._pieces[start]

    def _next_byte(self) -> int:
        """First byte of the next piece: the position, or the byte after the padding that starts there."""
        return self._jumps.get(self._position, self._position)

    def _hash_up_to(self, stop: int) -> int:
        """Hashes the file up to a byte, and returns the CRC-32 of the bytes hashed now."""
        checksum = 0
        if self._position >= stop:
            return checksum
        if self._block is None:
            self._block = memoryview(bytearray(READ_BLOCK))
        try:
            # Opened again each time: on a file system that machines share, this is what shows what others wrote.
            descriptor = FileDescriptor(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
            while self._position < stop:
                if self._is_abandoned:
                    raise ValueError(f"{self._path}: hashed after an exception")
                block = self._block[: stop - self._position]
                count = os.preadv(descriptor.number, [block], self._position)
                if not count:
                    raise self._changed(f"its end at byte {self._position}", f"{self._header.file_size} bytes")
                self._digest.update(block[:count])
                checksum = zlib.crc32(block[:count], checksum)
                self._position += count
        except OSError as error:
            raise cannot_be_written(self._path, self._header, error) from None
        return checksum

    def _changed(self, found: str, expected: str) -> OutputError:
        return OutputError(
            f"{self._path}: found {found}, expected {expected}; check the disk and the memory, then go on with --resume"
        )


def cannot_be_written(path: Path, header: FileHeader, error: OSError) -> OutputError:
    """The error for a disk that fails."""
    return OutputError(
        f"{path}: cannot be written ({error.strerror}), expected room for {header.file_size} bytes; "
        "free some space or name another --output"
    )


def _jumps(header: FileHeader) -> dict[int, int]:
    """The end of each tensor that padding follows → the start of the next tensor."""
    ends = [header.offsets[name] + spec.nbytes for name, spec in header.specs.items()]
    begins = [*list(header.offsets.values())[1:], header.file_size]
    return {end: begin for end, begin in zip(ends, begins, strict=False) if begin > end}
