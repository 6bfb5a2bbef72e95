"""What the files that a library is about to load hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.safetensors_file import SafetensorsFile
from omni_convert.formats.tensor_spec import TensorSpec

__all__ = ["read_headers"]


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
