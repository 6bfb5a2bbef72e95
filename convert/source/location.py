"""Finds the model that the user names: a folder, a file, a Hub repo id, or the bundled demo pipeline."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from omni_convert.convert.source.hub_selection import REPO_FILE, REPO_ID, cached_patterns, needed_files
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import CheckpointError, HubError, quoted

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

    from omni_convert.convert.source.hub_files import HubFile, HubFiles

__all__ = [
    "DEMO_EVALUATION_PROMPTS",
    "DEMO_PIPELINE",
    "DEMO_PROMPTS",
    "Source",
    "fetch_config",
    "resolve_source",
]

DEMO_PIPELINE = Path(__file__).parents[1] / "demo" / "pipeline"
DEMO_PROMPTS = Path(__file__).parents[1] / "demo" / "prompts.txt"
DEMO_EVALUATION_PROMPTS = Path(__file__).parents[1] / "demo" / "evaluation_prompts.txt"

# Folders of Wan2.2's experts in the layout of its own code, and what the pipeline calls them.
WAN_EXPERTS = {"high_noise_model": "transformer", "low_noise_model": "transformer_2"}
# Limit of a file's name on common file systems, in bytes.
LONGEST_NAME = 255


@dataclass(frozen=True)
class Source:
    """A model on the local disk, or one whose weights are still on the Hub.

    Attributes:
        path: pipeline folder (it has a model_index.json), component folder (config.json and weights) or weights file
        name: repo id, or the folder's name
        revision: commit of the Hub repository, if the model came from there
        hub_files: files of the Hub repository, if the weights are still there
        files: component to the file with its weights, for those that are not in the pipeline's folder
    """

    path: Path
    name: str
    revision: str | None = None
    hub_files: HubFiles | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def is_pipeline(self) -> bool:
        return (self.path / "model_index.json").is_file()

    @cached_property
    def components(self) -> dict[str, str]:
        """The components that model_index.json lists: name, which is that of the folder, to library.

        Raises:
            CheckpointError: the file is damaged, or a name would lead out of the pipeline's folder.
        """
        path = self.path / "model_index.json"
        listed = {name: value for name, value in read_json(path).items() if _is_component(value)}
        for name in listed:
            is_name = name.isprintable() and name not in ("", ".", "..") and len(name.encode()) <= LONGEST_NAME
            if not is_name or set(name) & set("/\\"):
                raise CheckpointError(
                    f"{path}: found component {quoted(name)}, expected the name of a folder; do not trust this pipeline"
                )
        return {name: library for name, (library, _) in listed.items()}

    @property
    def short_name(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def repo_id(self) -> str | None:
        return self.name if self.revision is not None else None

    def state(self, name: str, path: Path) -> list[int | str]:
        """Size plus mtime or Hub hash of a file, to detect a changed file."""
        is_named = path in self.files.values()
        if self.hub_files is not None and not is_named and name.lstrip("/") in self.hub_files.known:
            file = self.hub_files.known[name.lstrip("/")]
            return [file.size, file.identity]
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]


def _is_component(value: object) -> bool:
    """Whether an entry is [library, class]; both are null for a component that the pipeline does without."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def resolve_source(model: str | Path | None, revision: str | None = None, *, stream: bool = False) -> Source:
    """Finds the model of a path or repo id; a repository is downloaded from the Hub.

    Args:
        model: path or repo id, or None for the demo pipeline
        revision: branch, tag or commit on the Hub
        stream: leave the weights on the Hub until they are read

    Raises:
        CheckpointError: nothing is there, or it is a pickle checkpoint.
        HubError: the Hub cannot deliver the files.
    """
    if model is None:
        return Source(DEMO_PIPELINE, "omni-convert-demo")
    path = Path(model).expanduser()
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: found a pickle checkpoint, expected safetensors; it can run code, so it is not read"
        )
    if path.is_dir():
        _refuse_experts(path)
        return Source(path, path.resolve().name)
    if path.is_file():
        return Source(path, path.stem)
    if REPO_ID.fullmatch(str(model)):
        return _stream(str(model), revision) if stream else _download(str(model), revision)
    in_repository = REPO_FILE.fullmatch(str(model))
    if in_repository is not None:
        return _download(in_repository[1], revision, in_repository[2])
    raise CheckpointError(
        f"{model}: nothing is there; expected a folder, a .safetensors or .gguf file, or a repo id like Qwen/Qwen-Image"
        " (with a file's name behind it, if one file is meant)"
    )


def _refuse_experts(path: Path) -> None:
    """Raises CheckpointError for a folder with Wan2.2's two experts and no pipeline, as msModelSlim leaves one."""
    if all((path / folder).is_dir() for folder in WAN_EXPERTS) and not (path / "model_index.json").exists():
        components = " ".join(f"--component {name}={path / folder}" for folder, name in WAN_EXPERTS.items())
        raise CheckpointError(
            f"{path}: found {' and '.join(WAN_EXPERTS)} without a pipeline, expected model_index.json; use "
            f"`omni-convert PIPELINE -m keep {components}` with the model that they were made from"
        )


def _stream(repo_id: str, revision: str | None) -> Source:
    """The repository at the current commit of a revision: configs are downloaded, weights stay on the Hub."""
    from omni_convert.convert.source.hub_files import HubFiles

    try:
        info = _ask_for_files(repo_id, revision)
    except HubError as error:
        if error.is_unreachable:
            return _cached(repo_id, revision, error)
        raise
    known = {file.rfilename: _described(repo_id, file) for file in info.siblings or ()}
    needed = needed_files(repo_id, known)
    weights = frozenset(name for name in needed if name.endswith(".safetensors"))
    commit = str(info.sha)
    folder = _fetch(repo_id, commit, needed - weights)
    return Source(folder, repo_id, commit, hub_files=HubFiles(repo_id, commit, known, weights))


def fetch_config(repo_id: str, places: Sequence[str]) -> Path:
    """Downloads one file of a repository: the first of these that there is.

    Raises:
        HubError: this is no repository, it has none of them, or the Hub cannot deliver it.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise HubError(f"{repo_id}: nothing is there; expected a file, a folder, or a repo id like Qwen/Qwen-Image")
    info = _ask_for_files(repo_id, None)
    names = {file.rfilename for file in info.siblings or ()}
    place = next((place for place in places if place in names), None)
    if place is None:
        raise HubError(f"{repo_id}: found none of {', '.join(places)}, expected a model of diffusers")
    return _fetch(repo_id, str(info.sha), [place]) / place


def _ask_for_files(repo_id: str, revision: str | None) -> ModelInfo:
    from huggingface_hub import HfApi

    from omni_convert.convert.source.hub import ask_hub

    return ask_hub(repo_id, lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True))


def _fetch(repo_id: str, commit: str, names: Iterable[str]) -> Path:
    """Downloads files of a repository and returns its folder."""
    from huggingface_hub import snapshot_download

    from omni_convert.convert.source.hub import ask_hub

    exactly = [glob.escape(name) for name in sorted(names)]
    return Path(ask_hub(repo_id, lambda: snapshot_download(repo_id, revision=commit, allow_patterns=exactly)))


def _described(repo_id: str, file: RepoSibling) -> HubFile:
    from omni_convert.convert.source.hub_files import HubFile

    if file.size is None:
        raise HubError(
            f"{repo_id}/{file.rfilename}: found no size on this Hub, which streaming needs; use --keep-source"
        )
    return HubFile(file.size, file.lfs.sha256 if file.lfs is not None else str(file.blob_id))


def _download(repo_id: str, revision: str | None, file: str | None = None) -> Source:
    """Downloads a repository, or one of its files and the config beside it."""
    try:
        info = _ask_for_files(repo_id, revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        folder = _fetch(repo_id, str(info.sha), needed_files(repo_id, names, file))
    except HubError as error:
        if error.is_unreachable:
            return _cached(repo_id, revision, error, file)
        raise
    return Source(folder / file if file is not None else folder, repo_id, revision=folder.name)


def _cached(repo_id: str, revision: str | None, error: HubError, file: str | None = None) -> Source:
    """The repository in the local cache, for when the Hub does not answer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=cached_patterns(file), local_files_only=True)
        )
    except LocalEntryNotFoundError:
        found = None
    path = found / file if found is not None and file is not None else found
    if found is None or path is None or not path.exists():
        reason = str(error).partition(": ")[2]
        raise HubError(f"{repo_id}: no local path of that name, and {reason}")
    return Source(path, repo_id, revision=found.name)
