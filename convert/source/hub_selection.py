"""Selects the files of a Hub repository that a conversion needs: a pipeline, or one file and its config."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from pathlib import PurePosixPath

from omni_convert.formats.containers.component import BAGEL_WEIGHTS, GGUF_SUFFIX
from omni_convert.formats.errors import CheckpointError, did_you_mean, quoted

__all__ = ["REPO_FILE", "REPO_ID", "cached_patterns", "needed_files"]

REPO_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
#: A repository: `owner/name`.
REPO_ID = re.compile(REPO_NAME)
#: A file of weights in a repository, and the repository: `owner/name/folder/file.gguf`.
REPO_FILE = re.compile(rf"({REPO_NAME})/((?:[^/]+/)*[^/]+\.(?:gguf|safetensors))")
CONFIG = "config.json"
INDEX = "model_index.json"
# The files of a diffusers pipeline; repositories often also hold single-file duplicates of tens of gigabytes.
PATTERNS = (
    "*.json",
    "LICENSE*",
    "NOTICE*",
    "README.md",
    "*/*.json",
    "*/*.safetensors",
    "*/*.txt",
    "*/*.model",
    "*/*.jinja",
)
# The weights of a repository of transformers, all of whose other files are needed too.
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", BAGEL_WEIGHTS)
# Weights in other containers. A `.pt` is none of these: Qwen2.5-Omni keeps its voices in one, which is copied unread.
OTHER_WEIGHTS = (".bin", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", GGUF_SUFFIX)
# Only one file of a folder is read; several are usually the same model in several types.
GGUF_PATTERN = f"transformer*/*{GGUF_SUFFIX}"


def needed_files(repo_id: str, names: Collection[str], file: str | None = None) -> set[str]:
    """The files of a repository to download.

    Args:
        names: all files of the repository
        file: the file that the user named, if any

    Raises:
        CheckpointError: that file does not exist; or there are several GGUF files to choose from.
    """
    if file is not None:
        if file not in names:
            raise CheckpointError(
                f"{repo_id}: found no file {quoted(file)}, expected one of the repository{did_you_mean(file, names)}"
            )
        return {file, (PurePosixPath(file).parent / CONFIG).as_posix()} & {*names}
    if INDEX not in names and {CONFIG, *TRANSFORMERS_WEIGHTS}.intersection(names) > {CONFIG}:
        return {name for name in names if not name.endswith(OTHER_WEIGHTS) and "/." not in f"/{name}"}
    needed = {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS)}
    in_safetensors = {PurePosixPath(name).parent for name in needed if name.endswith(".safetensors")}
    in_gguf: dict[PurePosixPath, list[str]] = {}
    for name in sorted(fnmatch.filter(names, GGUF_PATTERN)):
        in_gguf.setdefault(PurePosixPath(name).parent, []).append(name)
    for folder, files in in_gguf.items():
        if folder not in in_safetensors:
            needed.add(_only_one(repo_id, files))
    others = sorted(name for name in names if name.endswith(GGUF_SUFFIX) and "/" not in name)
    if others and not in_safetensors and not in_gguf:
        needed.add(_only_one(repo_id, others))
    return needed


def _only_one(repo_id: str, files: list[str]) -> str:
    if len(files) > 1:
        raise CheckpointError(
            f"{repo_id}: found {len(files)} .gguf files (as {quoted(files[0])}, {quoted(files[1])}), expected one; "
            f"name the file that is meant, as {repo_id}/{files[0]}"
        )
    return files[0]


def cached_patterns(file: str | None = None) -> list[str]:
    """Patterns of the files that may be needed, for a repository whose list of files is unknown."""
    if file is not None:
        return [file, (PurePosixPath(file).parent / CONFIG).as_posix()]
    return [*PATTERNS, GGUF_PATTERN]
