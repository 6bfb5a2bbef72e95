"""Prompt files: what they may hold, and one line for each way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from omni_convert.convert.calibration.prompts import Prompt, read_prompts
from omni_convert.formats.errors import CalibrationError


def write(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_one_prompt_a_line_without_comments_and_empty_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "# colours\n\n  a red circle  \n\t# no prompt\nroom #3, ünïcödé\r\n")
    assert read_prompts(path) == [Prompt("a red circle"), Prompt("room #3, ünïcödé")]


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red circle\n")
    assert read_prompts(tmp_path / "prompts.txt") == [Prompt("a red circle")]


def test_json_lines_with_images_beside_the_file(tmp_path: Path, picture: Path) -> None:
    text = '# edits\n{"prompt": "make it blue", "image": "red.png"}\n{"prompt": "a square"}\n'
    assert read_prompts(write(tmp_path, text)) == [Prompt("make it blue", picture), Prompt("a square")]
    assert read_prompts(write(tmp_path, text, "prompts.jsonl"))[0].image == picture
    absolute = write(tmp_path, f'{{"prompt": "make it blue", "image": "{picture}"}}')
    assert read_prompts(absolute)[0].image == picture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no prompts"),
        ("# only a comment\n\n", "found no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', r":2: found bad JSON"),
        ('{"prompt": "a"}\na red circle\n', r":2: found bad JSON"),
        ("\n" + '{"prompt": ' + "[" * 100_000, r":2: found bad JSON"),
        ('{"prompt": ""}', r":1: found no text under 'prompt'"),
        ('{"image": "red.png"}', r":1: found no text under 'prompt'"),
        ('{"prompt": 3}', r":1: found no text under 'prompt'"),
        ('{"prompt": "a\\u0000b"}', r":1: found a NUL character under 'prompt'"),
        ("a red circle\na\0b", r"found a NUL character in line 2"),
        ('{"prompt": "a", "img": "red.png"}', r":1: found key 'img', expected prompt, image and audio"),
        ('{"prompt": "a", "image": 7}', r":1: found a JSON int under 'image'"),
        ('{"prompt": "a", "audio": 7}', r":1: found a JSON int under 'audio'"),
        ('{"prompt": "a", "audio": "absent.wav"}', r":1: audio .*absent\.wav missing"),
        ('{"prompt": "a", "image": "absent.png"}', r":1: image .*absent\.png missing"),
        ('{"prompt": "a", "image": "prompts.txt"}', r":1: image .*prompts\.txt cannot be read"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_json_lines_by_name_hold_nothing_but_objects(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="found a JSON str, expected an object"):
        read_prompts(write(tmp_path, '"a red circle"\n', "prompts.jsonl"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="file missing"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CalibrationError, match="no UTF-8"):
        read_prompts(tmp_path / "binary")


def test_json_lines_with_sounds_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "tone.wav").write_bytes(b"a tone")
    text = '{"prompt": "what is this?", "audio": "tone.wav"}\n'
    assert read_prompts(write(tmp_path, text)) == [Prompt("what is this?", None, tmp_path / "tone.wav")]


def test_a_fingerprint_is_of_the_content(tmp_path: Path, picture: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(picture.read_bytes())
    assert Prompt("a", picture).fingerprint() == Prompt("a", copy).fingerprint()
    Image.new("RGB", (8, 8), "blue").save(copy)
    different = {Prompt("a"), Prompt("b"), Prompt("a", picture), Prompt("a", copy), Prompt("a", audio=picture)}
    assert len({prompt.fingerprint() for prompt in different}) == 5


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_the_encoding_that_a_byte_order_mark_tells_is_in_the_remedy(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "prompts.txt").write_bytes("a red circle\n".encode(encoding))
    with pytest.raises(CalibrationError, match=f"byte order mark of .*`iconv -f {encoding} -t utf-8`"):
        read_prompts(tmp_path / "prompts.txt")


def test_utf_16_without_a_mark_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a red circle\n".encode("utf-16-le"))
    with pytest.raises(CalibrationError, match=r"found a NUL character in line 1.*`iconv -f utf-16le"):
        read_prompts(tmp_path / "prompts.txt")
