"""Prompts: a text file with one per line, or JSON Lines with `prompt` and, for some models, `image` and `audio`."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import CalibrationError

__all__ = ["Prompt", "check_image", "read_prompts"]

MAX_BYTES = 64 << 20
KEYS = ("prompt", "image", "audio")
_WANTED = "prompt, image and audio"
# UTF-32 comes first, since its byte order mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True)
class Prompt:
    """A text, an image to start from for pipelines that need one, and a sound for language models that hear."""

    text: str
    image: Path | None = None
    audio: Path | None = None

    @property
    def is_text(self) -> bool:
        """Whether there is neither an image nor a sound."""
        return self.image is None and self.audio is None

    def absolute(self) -> Prompt:
        """The same prompt for processes that run in another folder."""
        return Prompt(self.text, *(None if path is None else path.absolute() for path in (self.image, self.audio)))

    def fingerprint(self) -> str:
        """SHA-256 of the text and of the files' bytes, whatever their paths."""
        parts = [self.text, _digest(self.image), *([] if self.audio is None else [_digest(self.audio)])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads prompts, one per line; ignores empty lines and lines that start with `#`.

    The file is JSON Lines if its name ends in `.jsonl` or its first prompt starts with `{`. Paths of images and
    sounds are relative to the file's folder.

    Raises:
        CalibrationError: the file is missing, unreadable, not in UTF-8 or without prompts; a line is not a valid JSON
            object; an image or a sound is missing or cannot be read.
    """
    path = Path(path)
    lines = [
        (number, line.strip())
        for number, line in enumerate(_read(path).splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise CalibrationError(f"{path}: found no prompts, expected one a line, or JSON Lines with {_WANTED}")
    if path.suffix == ".jsonl" or lines[0][1].startswith("{"):
        return [_parse(f"{path}:{number}", line, path.parent) for number, line in lines]
    return [Prompt(line) for _, line in lines]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CalibrationError(f"{path}: found {path.stat().st_size} bytes, expected a file of prompts")
        data = path.read_bytes()
    except FileNotFoundError:
        raise CalibrationError(f"{path}: file missing, expected prompts, one per line or JSON Lines") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}), expected prompts, one a line") from None
    return _decoded(path, data)


def _decoded(path: Path, data: bytes) -> str:
    marked = next((encoding for mark, encoding in MARKS if data.startswith(mark)), None)
    if marked is not None:
        raise CalibrationError(
            f"{path}: found the byte order mark of {marked}, which is no UTF-8, expected text in UTF-8; convert it: "
            f"`iconv -f {marked.lower()} -t utf-8`"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: found bytes that are no UTF-8 ({error.reason} at byte {error.start}), expected text in UTF-8; "
            "convert it from the encoding that it is in, as with `iconv -f latin1 -t utf-8`"
        ) from None
    if "\0" in text:
        raise CalibrationError(
            f"{path}: found a NUL character in line {text[: text.index(chr(0))].count(chr(10)) + 1}, expected text in "
            "UTF-8; if it is UTF-16, `iconv -f utf-16le -t utf-8` converts it"
        )
    return text


def _parse(where: str, line: str, folder: Path) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: found bad JSON ({error}), expected an object with {_WANTED}") from None
    if not isinstance(entry, dict):
        raise CalibrationError(f"{where}: found a JSON {type(entry).__name__}, expected an object with {_WANTED}")
    for key in entry:
        if key not in KEYS:
            raise CalibrationError(f"{where}: found key '{key}', expected {_WANTED}")
    text = entry.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError(f"{where}: found no text under 'prompt', expected a non-empty string")
    if "\0" in text:
        raise CalibrationError(f"{where}: found a NUL character under 'prompt', expected text")
    image, audio = (_path(where, entry, key, folder) for key in ("image", "audio"))
    return Prompt(
        text,
        None if image is None else check_image(where, image),
        None if audio is None else _check_audio(where, audio),
    )


def _path(where: str, entry: Mapping[str, Any], key: str, folder: Path) -> Path | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise CalibrationError(f"{where}: found a JSON {type(value).__name__} under '{key}', expected a path")
    return None if value is None else folder / value


def check_image(where: str, path: Path) -> Path:
    """The path of an image that can be read.

    Raises:
        CalibrationError: it is missing or cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.verify()
    except FileNotFoundError:
        raise CalibrationError(f"{where}: image {path} missing, expected an image file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{where}: image {path} cannot be read ({error}), expected an image file") from None
    return path


def _check_audio(where: str, path: Path) -> Path:
    """The path of a sound, which is decoded when it is used; raises CalibrationError if there is no such file."""
    if not path.is_file():
        raise CalibrationError(f"{where}: audio {path} missing, expected an audio file")
    return path
