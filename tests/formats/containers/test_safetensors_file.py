from __future__ import annotations

import json
import math
import os
import pickle
import resource
import tracemalloc
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from omni_convert.convert.execution.memory import anonymous_memory
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.tensor_spec import TORCH_DTYPES, TensorSpec
from omni_convert.formats.errors import CheckpointError

FUZZ_EXAMPLES = int(os.environ.get("OMNI_CONVERT_FUZZ_EXAMPLES", "500"))
MIB = 1 << 20


def tensors_of_every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{name}": torch.randint(0, 2, (5, 3, 16), dtype=torch.uint8, generator=generator).view(dtype)
        for name, dtype in TORCH_DTYPES.items()
    }


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_header(header: bytes | str | dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    return len(encoded).to_bytes(8, "little") + encoded + data


def same_bytes(left: Tensor, right: Tensor) -> bool:
    as_bytes = [tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def test_every_dtype_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors_of_every_dtype(), path, metadata={"format": "pt", "note": "é"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt", "note": "é"}
        assert file.size == path.stat().st_size
        for name, tensor in load_file(path).items():
            assert file.specs[name] == TensorSpec(name, tensor.dtype, tuple(tensor.shape))
            assert same_bytes(file.read(name), tensor)
            assert same_bytes(file.read_rows(name, 1, 4), tensor[1:4])


def test_specs_are_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    header = {"b": entry("U8", [2], 2, 4), "empty": entry("F32", [0, 7], 2, 2), "a": entry("U8", [2], 0, 2)}
    (tmp_path / "a.safetensors").write_bytes(with_header(header, b"\1\2\3\4"))
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert list(file.specs) == ["a", "empty", "b"]
        assert file.read("b").tolist() == [3, 4]
        assert file.read("empty").shape == (0, 7)
        assert file.read_rows("empty", 0, 0).shape == (0, 7)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (1,)], ids=str)
def test_scalars_and_empty_tensors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"a": torch.ones(shape), "z": torch.arange(3)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read("a"), torch.ones(shape))
        assert file.read("z").tolist() == [0, 1, 2]


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 4), (4, 4)])
def test_rows_outside_the_tensor_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    save_file({"a": torch.ones(3, 2), "scalar": torch.ones(())}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        with pytest.raises(IndexError, match="rows"):
            file.read_rows("a", start, stop)
        with pytest.raises(IndexError, match="rows"):
            file.read_rows("scalar", 0, 0)


def test_the_header_hash_sees_names_and_not_values(tmp_path: Path) -> None:
    hashes = []
    for position, tensors in enumerate([{"a": torch.zeros(2)}, {"a": torch.ones(2)}, {"b": torch.zeros(2)}]):
        save_file(tensors, tmp_path / f"{position}.safetensors")
        with SafetensorsFile(tmp_path / f"{position}.safetensors") as file:
            hashes.append(file.header_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_read_takes_the_memory_of_its_rows_only(tmp_path: Path) -> None:
    rows, columns = 4096, MIB // 2  # 4 GiB of bfloat16, all of it a hole in the file
    path = tmp_path / "large.safetensors"
    path.write_bytes(with_header({"w": entry("BF16", [rows, columns], 0, rows * columns * 2)}))
    os.truncate(path, path.stat().st_size + rows * columns * 2)
    with SafetensorsFile(path) as file:
        before, peak = anonymous_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tile = file.read_rows("w", 2000, 2004)
        assert tile.shape == (4, columns)
        assert anonymous_memory() - before <= tile.nbytes + 8 * MIB
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak * 1024 <= 64 * MIB


def test_threads_read_what_one_reads(tmp_path: Path) -> None:
    weight = torch.arange(512 * 64, dtype=torch.int32).reshape(512, 64)
    save_file({"w": weight}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file, ThreadPoolExecutor(8) as pool:
        tiles = pool.map(lambda start: file.read_rows("w", start, start + 4), range(0, 512, 4))
        assert torch.equal(torch.cat(list(tiles)), weight)


def test_a_closed_file_is_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        pass
    with pytest.raises(ValueError, match="after close"):
        file.read("a")


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, file.size - 8)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            file.read("a")


A = entry("F32", [2], 0, 8)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "no complete safetensors file"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "no complete safetensors file"),
    "length zero": (bytes(8), "header of 0 bytes"),
    "length beyond the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "expected 2 to 100000000"),
    "length of all ones": (b"\xff" * 8 + b"{}", "expected 2 to 100000000"),
    "header longer than the file": (b"\xff\0\0\0\0\0\0\0{}", "expected a header of 255; the file is truncated"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "not utf-8": (with_header(b'{"\xff": 1}'), "expected UTF-8"),
    "a byte-order mark": (with_header("\ufeff{}"), "expected '{'"),
    "not an object": (with_header("[1, 2]"), "expected '{'"),
    "unfinished": (with_header('{"a":'), "found the end"),
    "unfinished name": (with_header('{"a'), "expected a JSON value"),
    "name is a number": (with_header("{1: 2}"), "expected a string"),
    "comma at the end": (with_header('{"a":{},}'), "found '{}', expected dtype"),
    "text after the end": (with_header("{} {}"), "expected the end of the header"),
    "half a character": (with_header('{"\\ud800": 1}'), "half a character"),
    "raw newline in a name": (with_header('{"a\nb": 1}'), "expected a JSON value"),
    "a name twice": (with_header(f'{{"a":{json.dumps(A)},"a":{json.dumps(A)}}}', bytes(8)), "'a' twice"),
    "a key twice": (with_header('{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "JSON value"),
    "entry is a list": (with_header({"a": [1]}), r"found '\[1\]', expected dtype"),
    "entry is null": (with_header({"a": None}), "found 'None', expected dtype"),
    "entry without shape": (with_header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "expected dtype"),
    "entry with more keys": (with_header({"a": A | {"more": 1}}, bytes(8)), "expected dtype, shape and data_offsets"),
    "metadata is a list": (with_header({"__metadata__": [], "a": A}, bytes(8)), "expected '{'"),
    "metadata value is a number": (with_header({"__metadata__": {"k": 1}}), "expected a string"),
    "metadata value is an object": (with_header({"__metadata__": {"k": {}}}), "expected a string"),
    "metadata key twice": (with_header('{"__metadata__":{"k":"1","k":"2"}}'), "'k' twice in __metadata__"),
    "metadata twice": (with_header('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    "unknown dtype": (with_header({"a": entry("F7", [2], 0, 8)}, bytes(8)), "dtype 'F7', expected one of BOOL, U8"),
    "dtype is a number": (with_header({"a": A | {"dtype": 4}}, bytes(8)), "dtype '4', expected one of BOOL"),
    "dtype is a list": (with_header({"a": A | {"dtype": []}}, bytes(8)), "expected dtype, shape and data_offsets"),
    "dtype F4": (with_header({"a": entry("F4", [4], 0, 2)}, bytes(2)), "not supported, store the tensor as U8"),
    "dtype F6": (with_header({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3)), "not supported, store the tensor as U8"),
    "negative shape": (with_header({"a": entry("F32", [-2], 0, 8)}, bytes(8)), r"shape '\[-2\]', expected a list"),
    "two negatives": (with_header({"a": entry("F32", [-1, -2], 0, 8)}, bytes(8)), "whole numbers"),
    "float shape": (with_header({"a": entry("F32", [2.0], 0, 8)}, bytes(8)), "whole numbers"),  # type: ignore[list-item]
    "boolean shape": (with_header({"a": entry("F32", [True], 0, 4)}, bytes(4)), "whole numbers"),
    "minus zero": (with_header('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "whole numbers"),
    "nan": (with_header('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "whole numbers"),
    "shape is text": (with_header({"a": entry("F32", "2", 0, 8)}, bytes(8)), "whole numbers"),  # type: ignore[arg-type]
    "nested shape": (with_header({"a": entry("F32", [[2]], 0, 8)}, bytes(8)), "expected dtype"),  # type: ignore[list-item]
    "huge dimension": (with_header({"a": entry("F32", [2**63], 0, 8)}, bytes(8)), "whole numbers"),
    "huge product": (with_header({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8)), "larger than any file"),
    "huge and empty": (with_header({"a": entry("F32", [2**62, 0, 2**62], 0, 0)}), "larger than any file"),
    "a thousand digits": (with_header({"a": entry("F32", [10**1000], 0, 8)}, bytes(8)), "whole numbers"),
    "one offset": (with_header({"a": A | {"data_offsets": [0]}}, bytes(8)), r"data_offsets '\[0\]', expected 8 bytes"),
    "offsets in reverse": (with_header({"a": entry("F32", [2], 8, 0)}, bytes(8)), "expected 8 bytes"),
    "offsets too close": (with_header({"a": entry("F32", [2], 0, 4)}, bytes(4)), "expected 8 bytes for F32"),
    "negative offset": (with_header({"a": entry("F32", [2], -8, 0)}, bytes(8)), "data_offsets '.-8, 0.'"),
    "overlap": (with_header({"a": A, "b": entry("U8", [8], 4, 12)}, bytes(12)), "'a' and 'b' overlapping at byte 4"),
    "same bytes twice": (with_header({"a": A, "b": A}, bytes(8)), "'a' and 'b' overlapping at byte 0"),
    "hole": (with_header({"a": A, "b": entry("U8", [2], 12, 14)}, bytes(14)), "4 unused bytes before tensor 'b'"),
    "hole at the start": (with_header({"a": entry("F32", [2], 8, 16)}, bytes(16)), "8 unused bytes before tensor 'a'"),
    "truncated": (with_header({"a": A}, bytes(7)), "found 7 bytes of tensors, expected 8; the file is truncated"),
    "trailing bytes": (with_header({"a": A}, bytes(9)), "found 1 bytes after the last tensor, expected none"),
    "bytes without tensors": (with_header({}, bytes(9)), "found 9 bytes after the last tensor"),
    "name with a newline": (with_header({"a\nb\u2028": entry("F7", [], 0, 1)}), r"tensor 'a\\nb\\u2028'"),
    "bomb of brackets": (with_header("[" * MIB), "expected '{'"),
    "bomb as an entry": (with_header('{"a":' + "[" * MIB), "expected a JSON value"),
    "bomb of shallow depth": (with_header('{"a":' + "[" * 800 + "]" * 800 + "}"), "expected dtype"),
    "bomb of objects": (with_header('{"a":' * MIB), "expected a JSON value"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_damaged_or_hostile_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert len(line.splitlines()) == 1
    assert len(line) < len(str(path)) + 500


def test_a_bomb_takes_no_more_memory_than_its_text(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(with_header('{"a":' + "[" + "[]," * (5 * MIB) + "[]]}"))  # built, these lists are 400 MB
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path, found in (
        (tmp_path / "pipe.safetensors", "device"),
        (tmp_path, "folder"),
        (tmp_path / "none", "No such"),
    ):
        with pytest.raises(CheckpointError, match=found):
            SafetensorsFile(path)


names = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(["a", "b", "__metadata__"])
sizes = st.integers(0, 6) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64]) | st.sampled_from([1.0, True, None, "2"])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def good_files(draw: st.DrawFn) -> bytes:
    members: list[tuple[str, Any]] = []
    position = 0
    for name in draw(st.lists(names.filter(lambda name: is_encodable(name) and name != "__metadata__"), unique=True)):
        dtype, shape = draw(st.sampled_from(list(TORCH_DTYPES))), draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        members.append((name, entry(dtype, shape, position, end)))
        position = end
    return with_header(to_json(draw(st.permutations(members))) + " " * draw(st.integers(0, 3)), bytes(position))


@st.composite
def flawed_files(draw: st.DrawFn) -> bytes:
    """Every part of the header may be wrong, and often a single one is."""
    members: list[tuple[str, Any]] = []
    position = 0
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from([*TORCH_DTYPES, "F4", "F6_E3M2", "f32"]))
        shape = draw(st.lists(sizes, max_size=3))
        claimed = TORCH_DTYPES[dtype].itemsize if dtype in TORCH_DTYPES else 1
        claimed *= math.prod(size for size in shape if isinstance(size, int) and 0 <= size < 8)
        begin = position + draw(st.sampled_from([0] * 12 + [-1, 1, 8]))
        members.append((draw(names), entry(dtype, shape, begin, begin + claimed)))
        position += claimed
    members += draw(st.lists(st.tuples(names, junk), max_size=1))
    members += draw(st.lists(st.tuples(st.just("__metadata__"), st.dictionaries(names, junk, max_size=3)), max_size=1))
    return with_header(to_json(draw(st.permutations(members))), bytes(position + draw(st.integers(0, 1))))


def is_encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def to_json(members: Iterable[tuple[str, Any]]) -> str:
    """An object with these members, duplicates included."""
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in members) + "}"


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A good file in which a few bytes are changed, removed or added."""
    good = bytearray(save({"a": torch.zeros(2, 3), "b.c": torch.ones(4, dtype=torch.int8)}, {"format": "pt"}))
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(good) - 1))
        kind = draw(st.sampled_from(["change", "remove", "add", "cut"]))
        if kind == "cut":
            del good[position + 1 :]
        elif kind == "remove":
            del good[position : position + draw(st.integers(1, 4))]
        else:
            good[position : position + (kind == "change")] = bytes([draw(st.integers(0, 255))])
        if not good:
            break
    return bytes(good)


def open_or_error(path: Path) -> SafetensorsFile | CheckpointError:
    try:
        return SafetensorsFile(path)
    except CheckpointError as error:
        return error


@settings(
    max_examples=FUZZ_EXAMPLES,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=good_files() | flawed_files() | mutated_files() | st.binary(max_size=64))
@example(content=with_header('{"a":{"dtype":"U8","shape":[0,-0],"data_offsets":[0,0]}}'))
def test_any_bytes_end_in_a_checked_file_or_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    result = open_or_error(path)
    if isinstance(result, CheckpointError):
        assert len(str(result).splitlines()) == 1
        return
    # What is accepted is what the reference accepts, and means the same there.
    reference = dict(safetensors.deserialize(content))
    assert reference.keys() == result.specs.keys()
    with result as file:
        for name, expected in reference.items():
            tensor = file.read(name)
            assert (tensor.dtype, list(tensor.shape)) == (TORCH_DTYPES[expected["dtype"]], expected["shape"])
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == bytes(expected["data"])


def test_another_process_opens_the_same_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(6.0).view(3, 2)}, path)
    content = pickle.dumps(SafetensorsFile(path))
    with pickle.loads(content) as again:
        assert torch.equal(again.read("w"), torch.arange(6.0).view(3, 2))
    save_file({"v": torch.arange(6.0).view(3, 2)}, path)
    with pytest.raises(CheckpointError, match="found another file than the one that the work began with") as caught:
        pickle.loads(content)
    assert "\n" not in str(caught.value)


def test_the_system_forgets_a_tensor_that_is_finished(tmp_path: Path) -> None:
    size = 8 << 20
    save_file({"a": torch.ones(size, dtype=torch.uint8), "b": torch.ones(size, dtype=torch.uint8)}, tmp_path / "w")
    with (tmp_path / "w").open("rb") as stream, SafetensorsFile(tmp_path / "w") as file:
        os.fsync(stream.fileno())

        def is_in_memory(position: int) -> bool:
            try:
                return os.preadv(stream.fileno(), [bytearray(4096)], position, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                return False

        stream.seek(0, os.SEEK_END)
        middle_of_a, middle_of_b = size // 2, stream.tell() - size // 2
        file.read("a")
        try:
            file.finished("a", size - 1)
            assert is_in_memory(middle_of_a)
            file.finished("a", 1)
        except OSError as error:
            pytest.skip(f"this file system cannot tell what is in memory ({error.strerror})")
        if is_in_memory(middle_of_a):
            pytest.skip("this file system keeps everything in memory")
        assert is_in_memory(middle_of_b)
