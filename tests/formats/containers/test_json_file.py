"""JSON that nobody vouches for: refused in one line, and never more memory than a small multiple of its bytes."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from omni_convert.formats.containers.json_file import MAX_JSON_BYTES, parse_json, read_json
from omni_convert.formats.errors import CheckpointError

# Memory that the worst text takes while it is read, over its bytes.
WORST_RATIO = 36


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[]", "a JSON list"),
        ('"text"', "a JSON str"),
        ("", "damaged JSON"),
        ("{", "damaged JSON"),
        ("[" * 100_000, "damaged JSON"),
        ('{"a":' * 100_000, "damaged JSON"),
        ("\udcff", "damaged JSON"),
        ('{"a":' + "9" * 5000 + "}", "damaged JSON"),
        (" " * (MAX_JSON_BYTES + 1), f"{MAX_JSON_BYTES + 1} bytes"),
    ],
    ids=range(9),
)
def test_hostile_json_is_one_line(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"config\.json: found {found}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name, found in (("pipe.json", "found a folder or device"), ("", "found a folder"), ("none", "file missing")):
        with pytest.raises(CheckpointError, match=found):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":[' + "[]," * 80_000 + "0]}",
        '{"a":[' + "{}," * 80_000 + "0]}",
        '{"a":[' + '{"":[]},' * 30_000 + "0]}",
        "{" + ",".join(f'"{number:x}":[]' for number in range(20_000)) + "}",
        "{" + ",".join(f'"{number:x}":{{"":0}}' for number in range(16_000)) + "}",
    ],
    ids=["lists", "objects", "objects of lists", "members", "members that are objects"],
)
def test_a_bomb_takes_a_small_multiple_of_its_bytes(text: str) -> None:
    tracemalloc.start()
    try:
        parse_json(text.encode(), "bomb", dict)
        assert tracemalloc.get_traced_memory()[1] < WORST_RATIO * len(text)
    finally:
        tracemalloc.stop()
