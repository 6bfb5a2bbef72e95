"""Finds the files that hold the weights of a component folder, and trusts neither the folder nor its index.

A folder holds one file or a set of shards in safetensors, under diffusers' or transformers' names or its own, or one
GGUF file. Every file lies in the folder itself; only a link into the blobs of the Hub cache, as `snapshots/` consists
of, may lead elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni_convert.formats.containers.component import BAGEL_WEIGHTS, GGUF_SUFFIX
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.shards import WEIGHTS_NAMES, ShardName, check_shard_names, index_name
from omni_convert.formats.errors import CheckpointError, quoted

__all__ = ["WeightFiles", "checked_path", "find_weight_files"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AGAIN = "download it again"
CONFIG = "config.json"
# Pickles of the repositories of Wan's own code, beside which the denoiser has other names.
WAN_FILES = re.compile(r"Wan[\d.]+_VAE\.pth|models_t5_umt5.*\.pth")
# `quant_method` of what tools save as pickles → what it is, and what to do.
PICKLED = {
    "torchao": ("torchao's tensors", "load it and save it with torchao 0.15 or newer, which writes safetensors"),
    "modelopt": (
        "what diffusers' modelopt quantizer saved",
        "export it with modelopt.torch.export.export_hf_checkpoint",
    ),
}
BLOBS, SNAPSHOTS = "blobs", "snapshots"


@dataclass(frozen=True)
class WeightFiles:
    """Files by name; which tensor is in which, where an index says so."""

    paths: dict[str, Path]
    weight_map: dict[str, str] | None = None


def find_weight_files(path: Path, elsewhere: Collection[str] = ()) -> WeightFiles:
    """The weights of a component folder, or of a single file.

    Args:
        path: the folder or file
        elsewhere: names of files that belong into the folder and are not on the disk

    Raises:
        CheckpointError: there are none, more than one set, some that are not safetensors, or some that lie elsewhere.
    """
    if path.is_file():
        return _single_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: nothing is there, expected a component folder or a .safetensors file")
    entries = sorted({*_entries(path), *elsewhere})
    weight_map = _find_index(path, entries)
    names = sorted(set(weight_map.values())) if weight_map is not None else _choose_files(path, entries)
    check_shard_names(names, path)
    return WeightFiles(
        {name: path / name if name in elsewhere else checked_path(path, name) for name in names}, weight_map
    )


def _single_file(path: Path) -> WeightFiles:
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(_pickle_message(path, path.name))
    if path.suffix == GGUF_SUFFIX:
        return WeightFiles({path.name: path})
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: found a '{path.suffix}' file, expected a component folder, a .safetensors or a .gguf file"
        )
    shard = ShardName.parse(path.name)
    if shard is not None and shard.total > 1:
        raise CheckpointError(
            f"{path}: found shard {shard.number} of {shard.total}, expected a whole checkpoint; name the folder"
        )
    return WeightFiles({path.name: path})


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}), expected a component folder") from None


def _find_index(folder: Path, entries: Sequence[str]) -> dict[str, str] | None:
    """The weight map of the folder's index, if it has one."""
    indices = [index_name(name) for name in WEIGHTS_NAMES if index_name(name) in entries]
    found = indices + [name for name in WEIGHTS_NAMES if name in entries]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: found both {found[0]} and {found[1]}, expected one set of weights; move the other away"
        )
    return _read_index(checked_path(folder, indices[0])) if indices else None


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, _unique_members).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: found no 'weight_map', expected tensor names and their files; {AGAIN}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            found = quoted(file) if isinstance(file, str) else f"a JSON {type(file).__name__}"
            raise CheckpointError(
                f"{path}: tensor {quoted(tensor)}: found {found}, expected the name of a .safetensors file in the same "
                "folder; do not trust this checkpoint"
            )
    return weight_map


def _unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members: dict[str, object] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{quoted(name)} occurs twice")
        members[name] = value
    return members


def _is_plain_name(file: str) -> bool:
    return file.endswith(".safetensors") and file.isprintable() and not set(file) & set("/\\")


def _choose_files(folder: Path, entries: Sequence[str]) -> list[str]:
    """The files of a folder without an index: the one with a usual name, else the only one, else a set of shards."""
    names = [name for name in entries if name.endswith(".safetensors")]
    in_gguf = [name for name in entries if name.endswith(GGUF_SUFFIX)]
    if not names and len(in_gguf) == 1:
        return in_gguf
    if not names and in_gguf:
        raise CheckpointError(
            f"{folder}: found {len(in_gguf)} .gguf files (as {quoted(in_gguf[0])}, {quoted(in_gguf[1])}), expected "
            "one; name the file that is meant"
        )
    if not names:
        raise CheckpointError(_nothing_message(folder, entries))
    usual = [name for name in (*WEIGHTS_NAMES, BAGEL_WEIGHTS) if name in names]
    if usual:
        return usual[:1]
    stems = {shard.stem if (shard := ShardName.parse(name)) else None for name in names}
    if len(names) == 1 or (len(stems) == 1 and None not in stems):
        return names
    raise CheckpointError(
        f"{folder}: found {len(names)} .safetensors files (as {quoted(names[0])}, {quoted(names[1])}) and no index, "
        f"expected {WEIGHTS_NAMES[0]} or one set of shards; name the file that is meant"
    )


def _nothing_message(folder: Path, entries: Sequence[str]) -> str:
    pickles = [name for name in entries if name.endswith(PICKLE_SUFFIXES)]
    if any(WAN_FILES.fullmatch(name) for name in pickles):
        return (
            f"{folder}: found {quoted(pickles[0])} of Wan's own code, expected a pipeline of diffusers; use the "
            "repository whose name ends in -Diffusers"
        )
    if pickles and (saved := _saved_by(folder, entries)) is not None:
        tool, remedy = saved
        return f"{folder}: found {tool} in the pickle {quoted(pickles[0])}, expected safetensors; {remedy}"
    if pickles:
        return _pickle_message(folder, pickles[0])
    if "model_index.json" in entries:
        return f"{folder}: found a whole pipeline, expected one component; name its folder, as {folder / 'transformer'}"
    return f"{folder}: found no weights, expected {WEIGHTS_NAMES[0]} or its shards; download it again"


def _saved_by(folder: Path, entries: Sequence[str]) -> tuple[str, str] | None:
    """The tool that saved a pickle, by the config beside it, and what to do; None if the config does not say."""
    block = read_json(folder / CONFIG).get("quantization_config") if CONFIG in entries else None
    return PICKLED.get(str(block.get("quant_method"))) if isinstance(block, dict) else None


def _pickle_message(where: Path, file: str) -> str:
    return (
        f"{where}: found the pickle {quoted(file)}, which can run code when it is read, expected safetensors; "
        "re-save it with save_pretrained(..., safe_serialization=True)"
    )


def checked_path(folder: Path, name: str) -> Path:
    """The path of a file of the folder.

    Raises:
        CheckpointError: it is missing, or a link that leaves the folder for anything but the Hub cache's blobs.
    """
    path = folder / name
    try:
        real, real_folder = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle; ValueError: no name of a file
        raise CheckpointError(f"{path}: the file is missing, expected a part of the checkpoint; {AGAIN}") from None
    if not real.is_file():
        raise CheckpointError(f"{path}: found a folder or device, expected a file of the checkpoint; {AGAIN}")
    if real.parent != real_folder and not any(real.is_relative_to(blobs) for blobs in _blob_folders(real_folder)):
        raise CheckpointError(
            f"{path}: found a link that leaves the folder, expected a file; put the file itself there if you trust it"
        )
    return path


def _blob_folders(folder: Path) -> Sequence[Path]:
    """Where links of a Hub snapshot may lead: the repository's blobs, or those that repositories share."""
    for parent in folder.parents:
        if parent.name == SNAPSHOTS:
            repository = parent.parent
            return [repository / BLOBS, repository.parent / BLOBS]
    return []
