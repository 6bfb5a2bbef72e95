"""A safetensors file whose tensors arrive in any order and in any pieces; see `formats/containers/writer.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omni_convert.formats.containers.header import MAX_HEADER_BYTES
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.safetensors_header import FORMAT_PT, LENGTH_BYTES, build_header
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.containers.writer import Container, TensorWriter
from omni_convert.formats.errors import CheckpointError, OutputError

__all__ = ["Safetensors", "SafetensorsWriter"]


@dataclass(frozen=True)
class Safetensors(Container):
    """A safetensors file.

    Attributes:
        metadata: free text that travels with the tensors
    """

    metadata: Mapping[str, str] = field(default_factory=lambda: dict(FORMAT_PT))

    def open_writer(
        self, path: Path, specs: Iterable[TensorSpec], *, resume: bool = False, join: bool = False
    ) -> SafetensorsWriter:
        return SafetensorsWriter(path, specs, self.metadata, resume=resume, join=join)

    def size(self, specs: Iterable[TensorSpec]) -> int:
        return build_header(specs, self.metadata)[0].file_size

    def check(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        with SafetensorsFile(path) as file:
            found, planned = file.specs, {spec.name: spec for spec in specs}
        if found != planned:
            differing = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
            raise CheckpointError(f"{path}: found other tensors than planned, first {differing[0]}; please report this")


class SafetensorsWriter(TensorWriter):
    """A safetensors file that is being written."""

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str] | None = FORMAT_PT,
        *,
        resume: bool = False,
        join: bool = False,
    ) -> None:
        """Creates the file at its full size and writes the header.

        Args:
            path: the file
            specs: all tensors that it will hold, in the order in which they should lie there (`build_header`)
            metadata: free text that travels with the tensors
            resume: as of `TensorWriter`
            join: as of `TensorWriter`

        Raises:
            OutputError: as of `TensorWriter`, or the header is too long for any reader.
        """
        header, text = build_header(specs, metadata)
        if len(text) > MAX_HEADER_BYTES:
            raise OutputError(
                f"{path}: found a header of {len(text)} bytes, expected at most {MAX_HEADER_BYTES}; "
                "use a smaller --max-shard-size"
            )
        super().__init__(path, header, len(text).to_bytes(LENGTH_BYTES, "little"), text, resume=resume, join=join)
