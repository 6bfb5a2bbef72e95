"""The header of a GGUF file, read as what it is: the claims of a stranger.

    4 bytes    GGUF
    4 bytes    version, 2 or 3
    16 bytes   number of tensors, number of key-values
               key-values: name, type, value
               tensors: name, number of dimensions, dimensions (the fastest first), type, offset in the data
    the rest   the tensors, each at a multiple of `general.alignment` from where the data begin

A parser of our own, since that of the `gguf` package trusts the file: an array that claims 2^60 numbers keeps it busy
for years, a product of dimensions wraps around, tensors may overlap, and each value of a tokenizer becomes an object.
Types, their sizes and the limits of versions are the package's.

Source:     ggml's docs/gguf.md
Limits:     100 MB of header, as of safetensors; little-endian; no arrays in arrays.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import gguf

from omni_convert.formats.containers.header import MAX_HEADER_BYTES
from omni_convert.formats.errors import CheckpointError, quoted

__all__ = ["MAGIC", "GgufEntry", "GgufHeader", "parse_gguf_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
DAMAGED = "the file is damaged, download or write it again"
CHUNK = 1 << 20
MAX_DIMENSIONS = 8
MAX_NAME_BYTES = 4096
MAX_TEXT_BYTES = 1 << 16
# An honest file has as many numbers in an array that we look at as a shape has.
MAX_NUMBERS = 64
MAX_ALIGNMENT = 1 << 16
STRING, ARRAY = int(gguf.GGUFValueType.STRING), int(gguf.GGUFValueType.ARRAY)
#: How a value of each type is packed.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Value = int | float | bool | str | tuple[int | float | bool, ...] | None


@dataclass(frozen=True)
class GgufEntry:
    """A tensor.

    Attributes:
        type: of its blocks
        shape: the slowest dimension first, as torch has it; that before it was reshaped for GGUF, if the file says so
        begin: its first byte in the file
    """

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block) * int(size)


@dataclass(frozen=True)
class GgufHeader:
    """The contents of a header.

    Attributes:
        entries: tensors in the order of their bytes
        values: key-values; None for an array of more than a few numbers, or of texts
        text: the header's bytes
    """

    entries: list[GgufEntry]
    values: dict[str, Value]
    text: bytes


@dataclass
class _Cursor:
    """Walks through the beginning of a file, reading no more of it than it must."""

    read: Callable[[int, int], bytes]
    size: int
    where: object
    position: int = 0
    _text: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> bytes:
        return bytes(self._text[: self.position])

    def take(self, count: int, what: str) -> bytes:
        end = self.position + count
        if end > min(self.size, MAX_HEADER_BYTES):
            limit = f"in a file of {self.size} bytes, truncated" if end > self.size else f"of over {MAX_HEADER_BYTES}"
            raise CheckpointError(f"{self.where}: found a header {limit} in {what}; {DAMAGED}")
        while len(self._text) < end:
            start = len(self._text)
            self._text += self.read(start, min(self.size, start + max(CHUNK, end - start)))
        taken = bytes(self._text[self.position : end])
        self.position = end
        return taken

    def number(self, kind: str, what: str) -> int | float | bool:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))
        return value  # type: ignore[no-any-return]  # struct's

    def count(self, kind: str, what: str) -> int:
        return int(self.number(kind, what))

    def string(self, limit: int, what: str) -> str | None:
        """A text; None for one that is longer."""
        length = self.count("Q", what)
        text = self.take(length, what)
        if length > limit:
            return None
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}: {what}: found {error.reason}, expected UTF-8; {DAMAGED}") from None

    def name(self, what: str) -> str:
        name = self.string(MAX_NAME_BYTES, what)
        if name is None:
            raise CheckpointError(f"{self.where}: {what}: found over {MAX_NAME_BYTES} bytes of a name; {DAMAGED}")
        return name


def parse_gguf_header(read: Callable[[int, int], bytes], size: int, where: object) -> GgufHeader:
    """Reads a header and checks every claim it makes against the size of the file.

    Args:
        read: bytes of the file from one position to another
        size: of the file, bytes
        where: what messages begin with

    Raises:
        CheckpointError: it is no GGUF file that is read here, or a damaged one.
    """
    cursor = _Cursor(read, size, where)
    _check_version(cursor)
    tensors, pairs = cursor.count("Q", "its counts"), cursor.count("Q", "its counts")
    values: dict[str, Value] = {}
    for number in range(pairs):
        key = cursor.name(f"key {number + 1} of {pairs}")
        if key in values:
            raise CheckpointError(f"{where}: found key {quoted(key)} twice, expected unique keys; {DAMAGED}")
        values[key] = _value(cursor, f"key {quoted(key)}")
    entries: dict[str, GgufEntry] = {}
    for number in range(tensors):
        entry = _entry(cursor, f"tensor {number + 1} of {tensors}")
        if entry.name in entries:
            raise CheckpointError(f"{where}: found tensor {quoted(entry.name)} twice, expected it once; {DAMAGED}")
        entries[entry.name] = entry
    placed = _placed(list(entries.values()), values, cursor)
    return GgufHeader([_reshaped(entry, values, where) for entry in placed], values, cursor.text)


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.take(4, "its first bytes") if cursor.size >= 4 else b""
    if magic != MAGIC:
        hint = "a Git LFS pointer; run `git lfs pull`" if magic == b"vers" else f"{magic!r} at its beginning"
        raise CheckpointError(f"{cursor.where}: found {hint}, expected a GGUF file")
    version = cursor.count("I", "its version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{cursor.where}: found a big-endian GGUF file, expected a little-endian one; convert it with the gguf "
            "package's gguf-convert-endian"
        )
    if version not in VERSIONS:
        raise CheckpointError(f"{cursor.where}: found GGUF version {version}, expected 2 or 3; write the file again")


def _value(cursor: _Cursor, what: str) -> Value:
    kind = cursor.count("I", what)
    if kind == STRING:
        return cursor.string(MAX_TEXT_BYTES, what)
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], what)
    if kind != ARRAY:
        raise CheckpointError(f"{cursor.where}: {what}: found a value of type {kind}, expected 0 to 12; {DAMAGED}")
    kind, count = cursor.count("I", what), cursor.count("Q", what)
    if kind == STRING:
        for _ in range(count):  # each takes eight bytes of the header at least
            cursor.string(0, what)
        return None
    if kind not in SCALARS:
        found = "an array of arrays" if kind == ARRAY else f"an array of type {kind}"
        raise CheckpointError(f"{cursor.where}: {what}: found {found}, expected numbers or texts; {DAMAGED}")
    numbers = cursor.take(count * struct.calcsize(f"<{SCALARS[kind]}"), what)
    return struct.unpack(f"<{count}{SCALARS[kind]}", numbers) if count <= MAX_NUMBERS else None


def _entry(cursor: _Cursor, what: str) -> GgufEntry:
    """A tensor; `begin` is where it is in the data."""
    name = cursor.name(what)
    what = f"tensor {quoted(name)}"
    count = cursor.count("I", what)
    if count > MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.where}: {what}: found {count} dimensions, expected up to {MAX_DIMENSIONS}")
    shape = tuple(reversed([cursor.count("Q", what) for _ in range(count)]))
    code, begin = cursor.count("I", what), cursor.count("Q", what)
    try:
        kind = gguf.GGMLQuantizationType(code)
        block = gguf.GGML_QUANT_SIZES[kind][0]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{cursor.where}: {what}: found type {code}, which the gguf package does not have; install a newer one, or "
            "download the file again"
        ) from None
    if block > 1 and (not shape or shape[-1] % block):
        raise CheckpointError(
            f"{cursor.where}: {what}: found {kind.name} with rows of {shape[-1] if shape else 1}, expected a multiple "
            f"of {block}; convert the model again"
        )
    return GgufEntry(name, kind, shape, begin)


def _placed(entries: list[GgufEntry], values: dict[str, Value], cursor: _Cursor) -> list[GgufEntry]:
    """The tensors by their places in the file, which are all inside of it and apart."""
    alignment = values.get(ALIGNMENT_KEY, gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(
            f"{cursor.where}: key '{ALIGNMENT_KEY}': found {alignment!r:.40}, expected a power of two from 8 to "
            f"{MAX_ALIGNMENT}; {DAMAGED}"
        )
    data = cursor.position + -cursor.position % alignment
    placed: list[GgufEntry] = []
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.nbytes)):
        where = f"{cursor.where}: tensor {quoted(entry.name)}"
        begin = data + entry.begin
        if entry.begin % alignment:
            raise CheckpointError(f"{where}: found it at {entry.begin}, expected a multiple of {alignment}; {DAMAGED}")
        if begin + entry.nbytes > cursor.size:
            raise CheckpointError(
                f"{where}: found it end at byte {begin + entry.nbytes} of {cursor.size}; the file is truncated, "
                "download or write it again"
            )
        if placed and begin < placed[-1].begin + placed[-1].nbytes:
            raise CheckpointError(f"{where}: found it overlap {quoted(placed[-1].name)}, expected none; {DAMAGED}")
        placed.append(GgufEntry(entry.name, entry.type, entry.shape, begin))
    return placed


def _reshaped(entry: GgufEntry, values: dict[str, Value], where: object) -> GgufEntry:
    """A tensor in the shape that it had before ComfyUI-GGUF's converter made rows of 256 of it."""
    shape = values.get(f"{ORIGINAL_SHAPE}{entry.name}")
    if f"{ORIGINAL_SHAPE}{entry.name}" not in values:
        return entry
    is_shape = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not is_shape or math.prod(shape) != math.prod(entry.shape):  # type: ignore[arg-type]  # it is a shape
        raise CheckpointError(
            f"{where}: key {quoted(ORIGINAL_SHAPE + entry.name)}: found {shape!r:.60}, expected a shape of "
            f"{math.prod(entry.shape)} numbers; {DAMAGED}"
        )
    return GgufEntry(entry.name, entry.type, tuple(int(size) for size in shape), entry.begin)  # type: ignore[union-attr]
