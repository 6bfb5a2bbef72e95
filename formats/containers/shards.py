"""How a checkpoint is cut into shards, named and indexed: as diffusers' and transformers' `save_pretrained` do it.

NAME.safetensors                        if all fits into one file, else
NAME-00001-of-00003.safetensors, ...    and
NAME.safetensors.index.json             {"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: FILE}}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from omni_convert.formats.containers.safetensors_writer import Safetensors
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.containers.writer import Container, TensorWriter
from omni_convert.formats.errors import CheckpointError, RecipeError

__all__ = ["WEIGHTS_NAMES", "ShardName", "Shards", "check_shard_names", "index_name", "open_shard", "plan_shards"]

#: Names of the weights of a component in diffusers and in transformers.
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")

SHARD_PATTERN = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors", re.ASCII)


@dataclass(frozen=True)
class ShardName:
    """The parts of `STEM-00001-of-00003.safetensors`."""

    stem: str
    number: int
    total: int

    @classmethod
    def parse(cls, file: str) -> ShardName | None:
        """The parts of a file name, or None if it does not name a shard."""
        match = SHARD_PATTERN.fullmatch(file)
        return cls(match["stem"], int(match["number"]), int(match["total"])) if match else None


@dataclass(frozen=True)
class Shards:
    """Files and the tensors of each, in the order given; the index if there is more than one file; what the files are.

    `index` has its keys in the order in which diffusers writes them, so that written as they come they are its bytes.
    """

    files: dict[str, list[TensorSpec]]
    index: dict[str, Any] | None
    index_name: str
    container: Container = field(default_factory=Safetensors)


def index_name(weights_name: str) -> str:
    """Name of the index that belongs to `weights_name`."""
    return f"{weights_name}.index.json"


def plan_shards(
    specs: Sequence[TensorSpec], max_shard_size: int | str, weights_name: str, unit_of: Callable[[str], str] = str
) -> Shards:
    """Distributes tensors over files of at most `max_shard_size` bytes (or one unit), in the order given.

    Args:
        max_shard_size: bytes, or a number with a unit, as "5GB"
        weights_name: one of `WEIGHTS_NAMES`
        unit_of: name of a tensor to that of its unit, whose tensors are neighbours and share a file

    Raises:
        RecipeError: the size cannot be understood.
    """
    assert len({spec.name for spec in specs}) == len(specs), "tensor names are unique"
    units: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        units.setdefault(unit_of(spec.name), []).append(spec)
    try:
        split = split_state_dict_into_shards_factory(
            units,
            get_storage_size=lambda unit: sum(spec.nbytes for spec in unit),
            filename_pattern=weights_name.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
        )
    except (ValueError, OverflowError):
        raise RecipeError(
            f"--max-shard-size: found '{max_shard_size}', expected a size like 5GB or 500MB (units KB, MB, GB, TB)"
        ) from None
    files = {
        file: [spec for name in names for spec in units[name]] for file, names in split.filename_to_tensors.items()
    }
    weight_map = {spec.name: file for file, members in files.items() for spec in members}
    index = {"metadata": split.metadata, "weight_map": dict(sorted(weight_map.items()))}
    return Shards(files, index if split.is_sharded else None, index_name(weights_name))


def check_shard_names(files: Iterable[str], where: object) -> None:
    """Shards that number themselves must agree on how many they are, and all be there.

    Raises:
        CheckpointError: two totals, or a number is missing.
    """
    numbers: dict[str, set[int]] = {}
    totals: dict[str, int] = {}
    for file in sorted(files):
        shard = ShardName.parse(file)
        if shard is None:
            continue
        if totals.setdefault(shard.stem, shard.total) != shard.total:
            raise CheckpointError(
                f"{where}: found shards of {totals[shard.stem]} and of {shard.total} (as {file}), expected one set; "
                "remove the files of the other"
            )
        numbers.setdefault(shard.stem, set()).add(shard.number)
    for stem, total in totals.items():
        if numbers[stem] != set(range(1, total + 1)):
            raise CheckpointError(
                f"{where}: found {len(numbers[stem])} shards of '{stem}', expected numbers 1 to {total}; "
                "download them again"
            )


def open_shard(folder: Path, file: str, shards: Shards, *, resume: bool = False, join: bool = False) -> TensorWriter:
    """The writer of one of the files of `shards`, which lies in `folder`; `resume` and `join` as of `TensorWriter`.

    Raises:
        OutputError: the file exists, cannot be created, or the disk has no room for all of it; there is none to join.
    """
    return shards.container.open_writer(folder / file, shards.files[file], resume=resume, join=join)
