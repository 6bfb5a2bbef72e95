"""The header of a safetensors file: where each tensor's bytes are.

    8 bytes    length N of the JSON that follows, little-endian
    N bytes    {"__metadata__": {"format": "pt"}, "NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    the rest   the tensors, without holes or overlaps; offsets count from here

Source:     safetensors' README, "Format"; like its own writer we pad with spaces up to a multiple of 8 bytes.
Order:      the one given, so that a file can be hashed while it is written. Where some tensor would then not begin at
            a multiple of its element size, which torch cannot view, the wide ones come first.
Limits:     100 MB of JSON, as in safetensors. No 4-bit and 6-bit dtypes: a byte of theirs is no whole element.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from omni_convert.formats.containers.header import FileHeader
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TORCH_DTYPES, TensorSpec
from omni_convert.formats.errors import CheckpointError, quoted

__all__ = ["FORMAT_PT", "LENGTH_BYTES", "build_header", "parse_header"]

#: The `__metadata__` of torch's writers; transformers refuses a file without it.
FORMAT_PT: Mapping[str, str] = MappingProxyType({"format": "pt"})
LENGTH_BYTES = 8

METADATA = "__metadata__"
ALIGNMENT = 8
MAX_TENSOR_BYTES = 2**63 - 1
# An honest entry has fewer than 200 characters. The limit bounds what one entry can cost before it is looked at.
MAX_ENTRY_CHARACTERS = 4096
# safetensors knows these, but an element of theirs is not a whole byte, or torch reads it on some devices only.
UNREADABLE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
DAMAGED = "the file is damaged, download or write it again"


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None) -> tuple[FileHeader, bytes]:
    """The header of a file with these tensors, and its JSON, padded.

    Raises:
        ValueError: two tensors have one name, or one has the name of the metadata.
    """
    ordered = _aligned(list(specs))
    content: dict[str, Any] = {} if metadata is None else {METADATA: dict(sorted(metadata.items()))}
    begins: dict[str, int] = {}
    position = 0
    for spec in ordered:
        if spec.name in begins or spec.name == METADATA:
            raise ValueError(f"tensor {quoted(spec.name)} is declared twice or reserved")
        begins[spec.name] = position
        position += spec.nbytes
        content[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (begins[spec.name], position),
        }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    data = LENGTH_BYTES + len(text)
    offsets = {name: data + begin for name, begin in begins.items()}
    return FileHeader({spec.name: spec for spec in ordered}, offsets, dict(metadata or {}), data + position), text


def _aligned(specs: list[TensorSpec]) -> list[TensorSpec]:
    """The specs in an order in which each tensor begins at a multiple of its element size."""
    begins = accumulate((spec.nbytes for spec in specs), initial=0)
    if all(begin % spec.dtype.itemsize == 0 for begin, spec in zip(begins, specs, strict=False)):
        return specs
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def parse_header(text: bytes, file_size: int, where: object) -> FileHeader:
    """Reads the JSON of a header and checks every claim it makes against the size of the file.

    Args:
        where: what messages begin with

    Raises:
        CheckpointError: the JSON is damaged, or the tensors it describes do not fill the file exactly.
    """
    try:
        scanner = _Scanner(text.decode(), where)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: found a header with {error.reason}, expected UTF-8; {DAMAGED}") from None
    metadata: dict[str, str] | None = None
    tensors: dict[str, _Extent] = {}
    for name in scanner.members():
        if name in tensors or (name == METADATA and metadata is not None):
            raise CheckpointError(f"{where}: found {quoted(name)} twice, expected unique names; {DAMAGED}")
        if name == METADATA:
            metadata = _read_metadata(scanner, where)
        else:
            tensors[name] = _read_tensor(name, scanner.value(), f"{where}: tensor {quoted(name)}")
    scanner.end()
    extents = sorted(tensors.values(), key=lambda extent: (extent.begin, extent.end))
    data = LENGTH_BYTES + len(text)
    _check_data(extents, file_size - data, where)
    return FileHeader(
        {extent.spec.name: extent.spec for extent in extents},
        {extent.spec.name: data + extent.begin for extent in extents},
        metadata or {},
        file_size,
    )


@dataclass(frozen=True)
class _Extent:
    """A tensor and its bytes in the data."""

    spec: TensorSpec
    begin: int
    end: int


class _Scanner:
    """Walks JSON objects a member at a time, so that a hostile header takes no more memory than an honest one.

    `json.loads` builds whatever it is given: 100 MB of `[],[],[],` would take gigabytes before the first check.
    """

    _space = re.compile(r"[ \t\n\r]*")

    def __init__(self, text: str, where: object) -> None:
        self._text = text
        self._where = where
        self._position = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique_members, parse_int=_parse_int)

    def members(self) -> Iterator[str]:
        """Yields each name of the object that begins here; the caller takes its value before it asks for the next."""
        self._expect("{")
        if self._take("}"):
            return
        while True:
            name = self.string()
            self._expect(":")
            yield name
            if not self._take(","):
                break
        self._expect("}")

    def string(self) -> str:
        """The string that begins here."""
        self._skip_space()
        if not self._text.startswith('"', self._position):
            raise self._error("a string")
        text = str(self._decode(self._text, self._position))
        if not _is_unicode(text):
            raise CheckpointError(
                f"{self._where}: found half a character in {quoted(text)}, expected Unicode; {DAMAGED}"
            )
        return text

    def value(self) -> object:
        """The value that begins here, of at most `MAX_ENTRY_CHARACTERS`, with no more nesting than a tensor's entry."""
        self._skip_space()
        start = self._position
        value = self._decode(self._text[start : start + MAX_ENTRY_CHARACTERS], 0)
        if self._text.count("[", start, self._position) > 2 or self._text.count("{", start, self._position) > 1:
            self._position = start
            raise self._error("dtype, shape and data_offsets")
        return value

    def end(self) -> None:
        """Nothing but padding may follow."""
        self._skip_space()
        if self._position != len(self._text):
            raise self._error("the end of the header")

    def _decode(self, text: str, start: int) -> object:
        try:
            value, stop = self._decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            raise self._error(f"a JSON value of up to {MAX_ENTRY_CHARACTERS} characters") from None
        self._position += stop - start
        return value

    def _skip_space(self) -> None:
        match = self._space.match(self._text, self._position)
        assert match is not None, "the pattern matches an empty text"
        self._position = match.end()

    def _take(self, character: str) -> bool:
        self._skip_space()
        is_there = self._text.startswith(character, self._position)
        self._position += is_there
        return is_there

    def _expect(self, character: str) -> None:
        if not self._take(character):
            raise self._error(f"'{character}'")

    def _error(self, expected: str) -> CheckpointError:
        found = self._text[self._position : self._position + 40]
        return CheckpointError(
            f"{self._where}: header: found {quoted(found) if found else 'the end'} at character {self._position}, "
            f"expected {expected}; {DAMAGED}"
        )


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_int(digits: str) -> int | float:
    """Reads an integer as safetensors' parser does: -0 is no integer there."""
    return -0.0 if digits == "-0" else int(digits)


def _unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _read_metadata(scanner: _Scanner, where: object) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for key in scanner.members():
        if key in metadata:
            raise CheckpointError(f"{where}: found {quoted(key)} twice in {METADATA}, expected unique keys; {DAMAGED}")
        metadata[key] = scanner.string()
    return metadata


def _read_tensor(name: str, entry: object, where: str) -> _Extent:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: found {quoted(str(entry))}, expected dtype, shape and data_offsets; {DAMAGED}")
    dtype = _check_dtype(entry["dtype"], where)
    shape = _check_sizes(entry["shape"], "shape", where)
    offsets = _check_sizes(entry["data_offsets"], "data_offsets", where)
    if math.prod(size for size in shape if size) * TORCH_DTYPES[dtype].itemsize > MAX_TENSOR_BYTES:
        raise CheckpointError(f"{where}: found shape {quoted(str(shape))}, larger than any file; {DAMAGED}")
    spec = TensorSpec(name, TORCH_DTYPES[dtype], shape)
    if len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
        raise CheckpointError(
            f"{where}: found data_offsets {quoted(str(list(offsets)))}, expected {spec.nbytes} bytes "
            f"for {dtype} {quoted(str(list(shape)))}; {DAMAGED}"
        )
    return _Extent(spec, offsets[0], offsets[1])


def _check_dtype(dtype: object, where: str) -> str:
    if isinstance(dtype, str) and dtype in TORCH_DTYPES:
        return dtype
    remedy = (
        "this dtype is not supported, store the tensor as U8 or BF16"
        if dtype in UNREADABLE_DTYPES
        else "see its writer"
    )
    raise CheckpointError(
        f"{where}: found dtype {quoted(str(dtype))}, expected one of {', '.join(TORCH_DTYPES)}; {remedy}"
    )


def _check_sizes(sizes: object, key: str, where: str) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size <= MAX_TENSOR_BYTES for size in sizes):
        raise CheckpointError(
            f"{where}: found {key} {quoted(str(sizes))}, expected a list of whole numbers from 0; {DAMAGED}"
        )
    return tuple(sizes)


def _check_data(extents: Sequence[_Extent], data_size: int, where: object) -> None:
    """The tensors, given in the order of their bytes, fill the data without holes and overlaps."""
    position, previous = 0, ""
    for extent in extents:
        name = extent.spec.name
        if extent.begin < position:
            raise CheckpointError(
                f"{where}: found tensors {quoted(previous)} and {quoted(name)} overlapping at byte {extent.begin} of "
                f"the data, expected bytes of their own; {DAMAGED}"
            )
        if extent.begin > position:
            raise CheckpointError(
                f"{where}: found {extent.begin - position} unused bytes before tensor {quoted(name)}, expected none; "
                f"{DAMAGED}"
            )
        position, previous = extent.end, name
    if position > data_size:
        raise CheckpointError(
            f"{where}: found {data_size} bytes of tensors, expected {position}; the file is truncated, "
            "download or write it again"
        )
    if position < data_size:
        raise CheckpointError(
            f"{where}: found {data_size - position} bytes after the last tensor, expected none; {DAMAGED}"
        )
