"""A checkpoint: the tensors of a component, in one file or many, as a mapping from name to what the tensor is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from omni_convert.formats.containers.component import GGUF_SUFFIX
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.containers.weight_files import find_weight_files
from omni_convert.formats.errors import CheckpointError, quoted
from omni_convert.formats.rows import WeightRows

__all__ = ["Checkpoint", "CheckpointRows"]

# The fingerprint reads this much of a tensor: training moves all of it, so that a few places tell models apart.
SAMPLES = 4
SAMPLE_BYTES = 256


@dataclass(frozen=True)
class CheckpointRows:
    """A matrix of a checkpoint, as `WeightRows`."""

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.file.specs[self.name].shape
        return out_features, in_features

    def read(self, start: int, stop: int) -> Tensor:
        return self.file.read_rows(self.name, start, stop)


def _open_file(path: Path) -> TensorFile:
    if path.suffix != GGUF_SUFFIX:
        return SafetensorsFile(path)
    from omni_convert.formats.containers.gguf_file import GgufReader  # the gguf package is slow to import

    return GgufReader(path)


class Checkpoint(Mapping[str, TensorSpec]):
    """All tensors of a component, file by file in the order of their bytes; reads may come from several threads.

    Attributes:
        path: the folder or file
        files: file name to reader
        weight_map: tensor name to file name
    """

    def __init__(self, path: Path, files: Mapping[str, TensorFile]) -> None:
        """Combines files into one checkpoint.

        Raises:
            CheckpointError: two files hold the same tensor, or none holds any.
        """
        self.path = path
        self.files = dict(files)
        self.weight_map: dict[str, str] = {}
        self._specs: dict[str, TensorSpec] = {}
        for name, file in self.files.items():
            for tensor in self._specs.keys() & file.specs.keys():
                raise CheckpointError(
                    f"{path}: found tensor {quoted(tensor)} in {self.weight_map[tensor]} and in {name}, "
                    "expected it once; remove the file that does not belong here"
                )
            self._specs |= file.specs
            self.weight_map |= dict.fromkeys(file.specs, name)
        if not self._specs:
            raise CheckpointError(f"{path}: found no tensors, expected the weights of a model")

    @classmethod
    def open(cls, path: Path, elsewhere: Mapping[str, Callable[[], TensorFile]] | None = None) -> Self:
        """Opens a component folder or a single .safetensors or .gguf file; only headers are read.

        Args:
            path: the folder or file
            elsewhere: files that belong into the folder and are not on the disk: name → what opens it

        Raises:
            CheckpointError: a file is missing, damaged, hostile or not safetensors, or the index contradicts the files.
        """
        remote = elsewhere or {}
        found = find_weight_files(path, remote.keys())
        files = {name: remote[name]() if name in remote else _open_file(file) for name, file in found.paths.items()}
        checkpoint = cls(path, files)
        if found.weight_map is not None:
            checkpoint._check_index(found.weight_map)
        return checkpoint

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all files; reads that are under way finish."""
        for file in self.files.values():
            file.close()

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        return self._file_of(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor with at least one dimension.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        return self._file_of(name).read_rows(name, start, stop)

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of a matrix, one small read for each row.

        Raises:
            CheckpointError: the file cannot be read, or has shrunk since it was opened.
        """
        spec, file = self[name], self._file_of(name)
        rows, columns = spec.shape
        size = spec.dtype.itemsize
        runs = [
            file.read_bytes(name, (row * columns + start) * size, (row * columns + stop) * size) for row in range(rows)
        ]
        return torch.frombuffer(bytearray(b"".join(runs)), dtype=spec.dtype).view(rows, stop - start)

    @property
    def metadata(self) -> dict[str, str]:
        """Free text in the headers of its files."""
        return {key: text for file in self.files.values() for key, text in file.metadata.items()}

    def finished(self, name: str, nbytes: int) -> None:
        """Notes that so many more bytes of a tensor are not needed any more."""
        self._file_of(name).finished(name, nbytes)

    def prefetch(self, name: str, limit: int) -> None:
        """Has the system read a tensor, at most `limit` bytes of it, while we do something else."""
        self._file_of(name).prefetch(name, limit)

    def rows(self, name: str) -> WeightRows:
        """Row-wise access to a matrix."""
        return CheckpointRows(self._file_of(name), name)

    def fingerprint(self) -> str:
        """Identity of the weights, in hex: names, dtypes, shapes and a sample of the bytes of every tensor.

        The same weights in other shards have the same fingerprint.

        Raises:
            CheckpointError: a file cannot be read, or has shrunk since it was opened.
        """
        digest = hashlib.sha256()
        for name in sorted(self):
            spec = self[name]
            digest.update(repr((name, DTYPE_NAMES[spec.dtype], spec.shape)).encode())
            digest.update(self._sample(spec))
        return digest.hexdigest()

    def _sample(self, spec: TensorSpec) -> bytes:
        """A few runs of the tensor's bytes, evenly spread from its first to its last; all of a small one."""
        file = self._file_of(spec.name)
        if spec.nbytes <= SAMPLES * SAMPLE_BYTES:
            return file.read_bytes(spec.name, 0, spec.nbytes)
        last = spec.nbytes - SAMPLE_BYTES
        starts = [last * sample // (SAMPLES - 1) for sample in range(SAMPLES)]
        return b"".join(file.read_bytes(spec.name, start, start + SAMPLE_BYTES) for start in starts)

    def _file_of(self, name: str) -> TensorFile:
        return self.files[self.weight_map[name]]

    def _check_index(self, claimed: Mapping[str, str]) -> None:
        for name in sorted(claimed.keys() | self.weight_map.keys()):
            expected, found = claimed.get(name), self.weight_map.get(name)
            if expected != found:
                raise CheckpointError(
                    f"{self.path}: tensor {quoted(name)}: found in {found or 'no shard'}, expected in "
                    f"{expected or 'none'} by the index; download both again"
                )
