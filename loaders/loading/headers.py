"""What the files that a library is about to load hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.shards import WEIGHTS_NAMES, index_name
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError

__all__ = ["loaded_files", "read_headers"]


def loaded_files(folder: Path, library: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component that its library reads, which leaves others in the folder alone.

    Of a variant, those that have its name, where there are some.

    Args:
        folder: that of the component
        library: as the pipeline's index has it: `diffusers`, `transformers` or a module of the pipeline's own

    Returns:
        nothing where the library will find nothing, or a file other than safetensors

    Raises:
        CheckpointError: an index is no JSON.
    """
    named = [name for name in _candidates(library, variant) if (folder / name).is_file()]
    if not named or named[0].endswith(".safetensors"):
        return [folder / name for name in named[:1]]
    weight_map = read_json(folder / named[0]).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return [folder / shard for shard in sorted(filter(_is_name, shards)) if (folder / shard).is_file()]


def _candidates(library: str, variant: str | None) -> Iterator[str]:
    """Names of weights and of their index, in the order in which a library looks for them."""
    ours, theirs = WEIGHTS_NAMES
    by_library = {
        "diffusers": (index_name(ours), ours),  # each as `_get_model_file` and `_get_resolved_checkpoint_files` have it
        "transformers": (theirs, index_name(theirs)),
    }
    names = by_library.get(library, (index_name(ours), ours, theirs, index_name(theirs)))
    if variant is not None:
        for name in names:
            stem, _, suffix = name.rpartition(".")
            yield f"{stem}.{variant}.{suffix}"
        yield index_name(ours).replace(".index.", f".{variant}.index.")  # which diffusers wrote once
    yield from names


def _is_name(shard: object) -> bool:
    return isinstance(shard, str) and shard.endswith(".safetensors")


def read_headers(files: Sequence[str | Path]) -> dict[str, TensorSpec]:
    """Every tensor of these files, by name; no data is read.

    Raises:
        CheckpointError: a file is not safetensors, or is damaged.
    """
    specs: dict[str, TensorSpec] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file}: found a {file.suffix} file, expected .safetensors for a quantized model")
        with SafetensorsFile(file) as reader:
            specs |= reader.specs
    return specs
