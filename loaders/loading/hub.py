"""Whether there is a pipeline where the user says, told in a line of our own and before any library tries for long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.errors as client
from huggingface_hub import hf_hub_download, try_to_load_from_cache

from omni_convert.formats.errors import CheckpointError

__all__ = ["require_pipeline"]

INDEX = "model_index.json"
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
EXPECTED = "expected the folder of a pipeline, or a repository on the Hub as Qwen/Qwen-Image"
# httpx's or httpx2's, whichever the client is built on.
REQUEST_ERRORS: type[Exception] = client.HTTPError  # type: ignore[attr-defined]  # imported there, not exported


def require_pipeline(model: str | Path, hub_options: Mapping[str, Any]) -> None:
    """Looks for the pipeline's index; of a repository it is fetched if it is not in the cache, as it would be anyway.

    Args:
        model: a folder or a Hub repository
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only` of `from_pretrained`

    Raises:
        CheckpointError: there is no pipeline.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise CheckpointError(f"{model}: found a folder without {INDEX}, {EXPECTED}")
        return
    if path.exists():
        raise CheckpointError(f"{model}: found a file, {EXPECTED}")
    if not REPO_ID.fullmatch(str(model)):
        raise CheckpointError(f"{model}: found no such folder, {EXPECTED}")
    cached = try_to_load_from_cache(
        str(model), INDEX, cache_dir=hub_options.get("cache_dir"), revision=hub_options.get("revision")
    )
    if isinstance(cached, str):
        return
    try:
        hf_hub_download(str(model), INDEX, **hub_options)
    except (REQUEST_ERRORS, OSError, ValueError) as error:
        raise CheckpointError(f"{model}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, client.GatedRepoError):
        return "the repository is gated; accept its terms on the Hub, then `hf auth login`"
    if isinstance(error, client.RevisionNotFoundError):
        return "found no such revision on the Hub, expected a branch, tag or commit"
    if isinstance(error, client.RepositoryNotFoundError):
        return f"found neither such a folder nor a repository on the Hub that this login can see, {EXPECTED}"
    if isinstance(error, client.LocalEntryNotFoundError):
        return f"found no such folder and nothing in the cache, and the Hub cannot be reached, {EXPECTED}"
    if isinstance(error, client.EntryNotFoundError):
        return f"found a repository without {INDEX}, {EXPECTED}"
    return f"the Hub fails ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
