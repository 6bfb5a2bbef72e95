"""Opens the file of a shard for writing, in the kind of file that it is."""

from __future__ import annotations

from pathlib import Path

from omni_convert.formats.safetensors_writer import SafetensorsWriter
from omni_convert.formats.sharding import Shards
from omni_convert.formats.tensor_writer import TensorWriter

__all__ = ["open_shard"]


def open_shard(folder: Path, file: str, shards: Shards, *, resume: bool = False, join: bool = False) -> TensorWriter:
    """The writer of one of the files of `shards`, which lies in `folder`; `resume` and `join` as of `TensorWriter`.

    Raises:
        OutputError: the file exists, cannot be created, or the disk has no room for all of it; there is none to join.
    """
    specs = shards.files[file]
    if shards.gguf is None:
        return SafetensorsWriter(folder / file, specs, shards.metadata, resume=resume, join=join)
    from omni_convert.formats.gguf_writer import GgufWriter

    return GgufWriter(folder / file, specs, shards.gguf, resume=resume, join=join)
