"""`push_to_hub`: uploads a finished output to a repository on the Hub in one commit.

Weights are uploaded first and belong to no commit yet. One commit then adds all of them with the configs, the manifest
and the card, and deletes weights of an earlier push that are no longer part of the model. So half a model is never
visible. After an interruption, files that have arrived are not uploaded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omni_convert.convert.execution.journal import JOURNAL
from omni_convert.convert.output.folder import is_finished
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import CheckpointError, HubError, OutputError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = ["Repository", "open_repository", "push_output", "push_to_hub"]

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".gguf")
EDITABLE = ("README.md",)
DEFAULT_BRANCH = "main"


@dataclass(frozen=True)
class Repository:
    """A repository that an output can be uploaded to.

    Attributes:
        weights: names of the files of weights that it holds already
    """

    repo_id: str
    revision: str | None
    weights: frozenset[str]


def push_to_hub(path: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a finished output; when repeated after an interruption, uploads only the missing files.

    Args:
        path: the output of a conversion
        repo_id: NAMESPACE/NAME, or a name in the login's own namespace; created if it does not exist
        private: create a private repository; a public one that exists is refused
        revision: branch, created if it does not exist; main by default

    Returns:
        The commit's address.

    Raises:
        OutputError: the folder is not a finished output; nothing was uploaded.
        CheckpointError: a file differs from the manifest; nothing was uploaded.
        HubError: there is no login, it may not write there, or the Hub cannot be reached; the repository is unchanged.
    """
    folder = Path(path)
    additions = _additions(folder)
    return _upload(folder, additions, open_repository(repo_id, private=private, revision=revision))


def open_repository(repo_id: str, *, private: bool = False, revision: str | None = None) -> Repository:
    """Checks the login, creates the repository if needed, and checks that it may be filled; see `push_to_hub`."""
    from huggingface_hub import HfApi

    from omni_convert.convert.source.hub import ask_hub

    api = HfApi()
    ask_hub(repo_id, api.whoami)
    created = ask_hub(repo_id, lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    name = created.repo_id
    if revision is not None and revision != DEFAULT_BRANCH and not revision.startswith("refs/"):
        branch = revision
        ask_hub(name, lambda: api.create_branch(name, branch=branch, exist_ok=True))
    info = ask_hub(name, lambda: api.model_info(name, revision=revision))
    if private and not info.private:
        raise HubError(
            f"{name}: found a public repository, expected a private one; change that in its settings, or name another"
        )
    files = {file.rfilename for file in info.siblings or ()}
    weights = frozenset(file for file in files if file.endswith(WEIGHT_SUFFIXES))
    if weights and MANIFEST not in files:
        raise HubError(
            f"{name}: found another model ({min(weights)}), expected an empty repository or one that omni-convert "
            "filled; name another"
        )
    return Repository(name, revision, weights)


def push_output(folder: Path, repository: Repository) -> str:
    """Uploads a finished output to a repository that was opened before the conversion; see `push_to_hub`."""
    return _upload(folder, _additions(folder), repository)


def _declared_files(folder: Path) -> Mapping[str, str]:
    """SHA-256 of the files of a finished output, by name.

    Raises:
        OutputError: the folder is not a finished output.
    """
    if folder.name.endswith(".partial") or not folder.is_dir() or (folder / JOURNAL).exists():
        raise OutputError(
            f"{folder}: found no finished output, expected a folder that omni-convert made; convert first"
        )
    if not is_finished(folder):
        raise OutputError(
            f"{folder}: found no finished output (no {MANIFEST}, or a conversion under way in {folder.name}.partial); "
            "finish it with --resume"
        )
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise OutputError(f"{folder / MANIFEST}: found a damaged manifest; convert again")
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: the file is missing, expected it by the manifest; convert again")
    return files


def _additions(folder: Path) -> list[CommitOperationAdd]:
    """Every file of a finished output, checked against the manifest."""
    from huggingface_hub import CommitOperationAdd

    declared = _declared_files(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    shown = [name for name in names if "/." not in f"/{name}"]
    additions = [CommitOperationAdd(name, folder / name) for name in shown]
    for addition in additions:
        _check_unchanged(folder, addition, declared)
    return additions


def _upload(folder: Path, additions: list[CommitOperationAdd], repository: Repository) -> str:
    from huggingface_hub import CommitOperationDelete, HfApi

    from omni_convert.convert.source.hub import ask_hub

    stale = repository.weights - {addition.path_in_repo for addition in additions}
    deletions = [CommitOperationDelete(name) for name in sorted(stale)]
    commit = ask_hub(
        repository.repo_id,
        lambda: HfApi().create_commit(
            repository.repo_id,
            [*additions, *deletions],
            commit_message=f"Upload {folder.resolve().name}, made by omni-convert",
            revision=repository.revision,
        ),
    )
    return str(commit.commit_url)


def _check_unchanged(folder: Path, addition: CommitOperationAdd, declared: Mapping[str, str]) -> None:
    name = addition.path_in_repo
    if name in declared and name not in EDITABLE and addition.upload_info.sha256.hex() != declared[name]:
        raise CheckpointError(
            f"{folder / name}: found other bytes than the manifest says, expected what was converted; convert again"
        )
