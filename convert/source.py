"""Finds the checkpoint that the user means: a folder, a file, a Hub repo id, or the bundled demo pipeline."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_convert.formats.errors import CheckpointError

__all__ = ["DEMO_EVALUATION_PROMPTS", "DEMO_PIPELINE", "DEMO_PROMPTS", "Source", "read_json", "resolve_source"]

DEMO_PIPELINE = Path(__file__).parent / "demo" / "pipeline"
DEMO_PROMPTS = Path(__file__).parent / "demo" / "prompts.txt"
DEMO_EVALUATION_PROMPTS = Path(__file__).parent / "demo" / "evaluation_prompts.txt"

MAX_JSON_BYTES = 64 << 20
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a diffusers pipeline consists of; repositories also hold single-file duplicates of tens of gigabytes beside it.
HUB_PATTERNS = [
    "*.json",
    "LICENSE*",
    "NOTICE*",
    "README.md",
    "*/*.json",
    "*/*.safetensors",
    "*/*.txt",
    "*/*.model",
    "*/*.jinja",
]


@dataclass(frozen=True)
class Source:
    """A checkpoint on the local disk.

    Attributes:
        path: pipeline folder (it has a model_index.json), component folder (config.json and weights) or weights file
        name: repo id, or the folder's name
        revision: commit of the Hub repository, if it came from there
        is_demo: the bundled pipeline, because no model was named
    """

    path: Path
    name: str
    revision: str | None = None
    is_demo: bool = False

    @property
    def is_pipeline(self) -> bool:
        return (self.path / "model_index.json").is_file()

    @property
    def short_name(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def repo_id(self) -> str | None:
        return self.name if self.revision is not None else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for.

    Raises:
        CheckpointError: missing, too large, nested too deep, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: found {path.stat().st_size} bytes, expected a JSON file of a few kilobytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file missing; is this a diffusers pipeline or component folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: found unreadable JSON ({error}), expected an object") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content


def resolve_source(model: str | Path | None, revision: str | None = None) -> Source:
    """Turns what the user typed into files on the disk, downloading from the Hub where it is a repo id.

    Raises:
        CheckpointError: nothing is there, it is a pickle checkpoint, or the Hub does not deliver it.
    """
    if model is None:
        return Source(DEMO_PIPELINE, "omni-convert-demo", is_demo=True)
    path = Path(model).expanduser()
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: found a pickle checkpoint, expected safetensors; it can run code, so it is not read"
        )
    if path.is_dir():
        return Source(path, path.resolve().name)
    if path.is_file():
        return Source(path, path.stem)
    if REPO_ID.fullmatch(str(model)):
        return _download(str(model), revision)
    raise CheckpointError(
        f"{model}: nothing is there; expected a folder, a .safetensors file or a Hub repo id like Qwen/Qwen-Image"
    )


def _download(repo_id: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=HUB_PATTERNS))
    except GatedRepoError:
        raise CheckpointError(
            f"{repo_id}: the repository is gated; accept its terms on the Hub, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo_id}: found no revision '{revision}' on the Hub") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id}: neither a local path nor a repository on the Hub that this login can see"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{repo_id}: no local path of that name, and the Hub does not answer ({type(error).__name__}: {reason})"
        ) from None
    return Source(folder, repo_id, revision=folder.name)
