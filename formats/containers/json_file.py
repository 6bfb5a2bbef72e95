"""JSON files that nobody vouches for: regular files of bounded size that hold an object.

The size also bounds memory: what Python builds of the worst text takes some 30 times its bytes.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_convert.formats.containers.open_file import FileDescriptor
from omni_convert.formats.errors import CheckpointError

__all__ = ["MAX_JSON_BYTES", "parse_json", "read_json"]

#: The largest honest ones, indexes and manifests of models with 100,000 tensors, have as much.
MAX_JSON_BYTES = 8 << 20

Members = list[tuple[str, Any]]


def read_json(path: Path, hook: Callable[[Members], object] | None = None) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        hook: makes an object of its members, for callers that refuse some

    Raises:
        CheckpointError: missing, no regular file, too large, nested too deep, or not an object.
    """
    try:
        # Opening a pipe would wait for its writer without O_NONBLOCK; regular files ignore the flag.
        descriptor = FileDescriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        status = os.fstat(descriptor.number)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: found a folder or device, expected a JSON file")
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: found {status.st_size} bytes, expected a JSON file of a few kilobytes")
        text = os.pread(descriptor.number, status.st_size, 0)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file missing; is this a diffusers pipeline or component folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}), expected a JSON file") from None
    return parse_json(text, path, hook)


def parse_json(text: bytes, where: object, hook: Callable[[Members], object] | None = None) -> dict[str, Any]:
    """A JSON object.

    Args:
        where: what messages begin with
        hook: as above

    Raises:
        CheckpointError: too large, not UTF-8, nested too deep, or not an object.
    """
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where}: found {len(text)} bytes, expected JSON of a few kilobytes")
    try:
        content = json.loads(text.decode(), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{where}: found damaged JSON ({reason}), expected an object; get it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: found a JSON {type(content).__name__}, expected an object")
    return content
