"""Where the files of a pipeline are, and one reader for each of them however many parts of loading ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS, GGUF_SUFFIX
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.shards import WEIGHTS_NAMES, index_name
from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders.loading import hub

__all__ = ["INDEX", "find_gguf_components", "loaded_files", "open_weights", "require_pipeline", "shared_readers"]

INDEX = "model_index.json"

_shared_readers: ContextVar[dict[Path, SafetensorsFile] | None] = ContextVar("_shared_readers", default=None)


def require_pipeline(model: str | Path, hub_options: Mapping[str, Any]) -> None:
    """Checks that there is a pipeline, before any library searches for long.

    Args:
        model: a folder or a Hub repository, whose index is fetched if it is not in the cache
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only` of `from_pretrained`

    Raises:
        CheckpointError: there is no pipeline.
    """
    path = Path(model)
    if not path.is_dir():
        if path.exists():
            raise CheckpointError(f"{model}: found a file, {hub.EXPECTED}")
        hub.fetch_index(str(model), INDEX, hub_options)
    elif not (path / INDEX).is_file():
        raise CheckpointError(f"{model}: found a folder without {INDEX}, {hub.EXPECTED}")


def find_gguf_components(model: str | Path, hub_options: Mapping[str, Any]) -> list[Path]:
    """Folders of the denoising models that hold a GGUF file and no safetensors.

    Args:
        model: a folder, or a repository on the Hub, from which only these components are fetched
        hub_options: as for `require_pipeline`
    """
    folder = Path(model) if Path(model).is_dir() else hub.fetch_gguf(str(model), INDEX, hub_options)
    return [] if folder is None else [path for name in DENOISERS if _is_gguf(path := folder / name)]


def _is_gguf(folder: Path) -> bool:
    return any(folder.glob(f"*{GGUF_SUFFIX}")) and not any(folder.glob("*.safetensors"))


def loaded_files(folder: Path, library: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component that its library reads; it ignores others in the folder.

    Args:
        folder: that of the component
        library: as in the pipeline's index: `diffusers`, `transformers` or a module of the pipeline's own
        variant: files with this name come first, if there are some

    Returns:
        nothing if the library will find nothing, or a file other than safetensors

    Raises:
        CheckpointError: an index is not JSON.
    """
    named = [name for name in _candidates(library, variant) if (folder / name).is_file()]
    if not named or named[0].endswith(".safetensors"):
        return [folder / name for name in named[:1]]
    weight_map = read_json(folder / named[0]).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return [folder / shard for shard in sorted(filter(_is_shard, shards)) if (folder / shard).is_file()]


def _candidates(library: str, variant: str | None) -> Iterator[str]:
    """Names of weights and of their index, in the order in which a library looks for them."""
    ours, theirs = WEIGHTS_NAMES
    by_library = {
        "diffusers": (index_name(ours), ours),  # the order of `_get_model_file`
        "transformers": (theirs, index_name(theirs)),  # the order of `_get_resolved_checkpoint_files`
    }
    names = by_library.get(library, (index_name(ours), ours, theirs, index_name(theirs)))
    if variant is not None:
        for name in names:
            stem, _, suffix = name.rpartition(".")
            yield f"{stem}.{variant}.{suffix}"
        yield index_name(ours).replace(".index.", f".{variant}.index.")  # diffusers wrote this name once
    yield from names


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors")


@contextmanager
def shared_readers() -> Iterator[None]:
    """Has `open_weights` open each file once; the files stay open until the end of this context."""
    readers: dict[Path, SafetensorsFile] = {}
    token = _shared_readers.set(readers)
    try:
        yield
    finally:
        _shared_readers.reset(token)
        _close(readers)


@contextmanager
def open_weights(files: Sequence[str | Path]) -> Iterator[Checkpoint]:
    """The tensors of a component's files; only headers are read.

    Raises:
        CheckpointError: there are no files; or one is not safetensors, or is damaged.
    """
    shared = _shared_readers.get()
    readers = {} if shared is None else shared
    paths = [Path(file) for file in files]
    try:
        opened = {path.name: _reader(path, readers) for path in paths}
        yield Checkpoint(paths[0].parent if paths else Path(), opened)
    finally:
        if shared is None:
            _close(readers)


def _reader(path: Path, readers: dict[Path, SafetensorsFile]) -> SafetensorsFile:
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: found a {path.suffix} file, expected .safetensors for a quantized model")
    key = path.absolute()
    if key not in readers:
        readers[key] = SafetensorsFile(path)
    return readers[key]


def _close(readers: Mapping[Path, SafetensorsFile]) -> None:
    for reader in readers.values():
        reader.close()
