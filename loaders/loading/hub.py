"""Downloads from the Hub what loading needs before any library asks for it."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.errors as client
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache

from omni_convert.formats.containers.component import DENOISERS, GGUF_SUFFIX
from omni_convert.formats.errors import CheckpointError, quoted
from omni_convert.formats.hub_errors import HUB_ERRORS, cause_of, hub_reason

__all__ = ["EXPECTED", "fetch_gguf", "fetch_gguf_file", "fetch_index"]

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# `OWNER/NAME/PATH.gguf` or `OWNER/NAME:TYPE`.
GGUF_MODEL = re.compile(rf"(?P<repo_id>{REPO_ID.pattern})(?:/(?P<file>.+\.gguf)|:(?P<type>[\w.-]+))")
EXPECTED = "expected the folder of a pipeline, or a repository on the Hub as Qwen/Qwen-Image"


def fetch_index(repo_id: str, index: str, options: Mapping[str, Any]) -> None:
    """Downloads the index of a pipeline unless it is in the cache; loading would download it anyway.

    Raises:
        CheckpointError: there is no such repository or index, or it cannot be read.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise CheckpointError(f"{repo_id}: found no such folder, {EXPECTED}")
    cached = try_to_load_from_cache(
        repo_id, index, cache_dir=options.get("cache_dir"), revision=options.get("revision")
    )
    if isinstance(cached, str):
        return
    try:
        hf_hub_download(repo_id, index, **options)
    except HUB_ERRORS as error:
        raise _failure(repo_id, error, index) from error


def _failure(model: str, error: Exception, wanted: str) -> CheckpointError:
    cause = cause_of(error)
    if isinstance(cause, client.LocalEntryNotFoundError):
        reason = f"found no such folder and nothing in the cache, and the Hub cannot be reached, {EXPECTED}"
    elif isinstance(cause, client.EntryNotFoundError):
        reason = f"found a repository without {wanted}, {EXPECTED}"
    else:
        reason = hub_reason(cause)
    return CheckpointError(f"{model}: {reason}")


def fetch_gguf(repo_id: str, index: str, options: Mapping[str, Any]) -> Path | None:
    """Downloads the denoising models that a repository holds in GGUF, with their configs and the pipeline's index.

    Returns:
        their folder; None if there are none, or if the Hub fails, which diffusers will report

    Raises:
        CheckpointError: a component has several GGUF files.
    """
    try:
        if options.get("local_files_only"):
            return Path(hf_hub_download(repo_id, index, **options)).parent
        names = HfApi(token=options.get("token")).list_repo_files(repo_id, revision=options.get("revision"))
        in_gguf = {name: file for name in DENOISERS if (file := _only_gguf(repo_id, name, names)) is not None}
        if not in_gguf:
            return None
        files = [index, *(f"{name}/config.json" for name in in_gguf), *in_gguf.values()]
        return Path(snapshot_download(repo_id, allow_patterns=[glob.escape(file) for file in files], **options))
    except HUB_ERRORS:
        return None


def fetch_gguf_file(gguf_model: str, options: Mapping[str, Any]) -> Path:
    """Downloads one GGUF file, named as in vLLM-Omni.

    Args:
        gguf_model: `OWNER/NAME/PATH.gguf`, or `OWNER/NAME:TYPE` for the repository's file of that type
        options: `token`, `cache_dir`, `local_files_only` of `from_pretrained`

    Raises:
        CheckpointError: there is no such file, the type does not name one file, or the Hub fails.
    """
    named = GGUF_MODEL.fullmatch(gguf_model)
    if named is None:
        raise CheckpointError(
            f"{gguf_model}: found no such file, expected a .gguf file, or OWNER/NAME/FILE.gguf or OWNER/NAME:TYPE"
        )
    try:
        file = named["file"] or _file_of_type(named["repo_id"], named["type"], options)
        return Path(hf_hub_download(named["repo_id"], file, **options))
    except HUB_ERRORS as error:
        raise _failure(gguf_model, error, "such a file") from error


def _file_of_type(repo_id: str, kind: str, options: Mapping[str, Any]) -> str:
    names = HfApi(token=options.get("token")).list_repo_files(repo_id)
    of_type = re.compile(rf".*-{re.escape(kind)}(-.*)?\.gguf", re.IGNORECASE)
    found = [name for name in names if of_type.fullmatch(name.rpartition("/")[2])]
    if len(found) != 1:
        raise CheckpointError(
            f"{repo_id}: found {len(found)} .gguf files of type {quoted(kind)}, expected one; name the file, as "
            f"{repo_id}/FILE.gguf"
        )
    return found[0]


def _only_gguf(repo_id: str, component: str, names: Iterable[str]) -> str | None:
    """The GGUF file of a component; None if it has none, or has safetensors too."""
    files = [name for name in names if name.rpartition("/")[0] == component]
    found = sorted(name for name in files if name.endswith(GGUF_SUFFIX))
    if not found or any(name.endswith(".safetensors") for name in files):
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{repo_id}: found {len(found)} .gguf files (as {quoted(found[0])}, {quoted(found[1])}), expected one; "
            "download the repository with the one that is meant, and name the folder"
        )
    return found[0]
