"""The moments file: second moments of every linear input, for error-compensating rounding. Large, hence a file apart.

It is one safetensors file. For each layer NAME (`component.stem`) it holds

    NAME.products   F32  [blocks, size, size]   X^T X over all rows X that were seen, [1, in, in] up to in = 4096; for
                                                wider inputs its diagonal blocks of 512 x 512, the last padded with 0
    NAME.count      I64  [1]                    number of rows
    NAME.rows       BF16 [<= 64, in]            rows with the smallest hashes, as in the statistics file
    NAME.row_runs   I64  [<= 64, 2]             prompt and denoising step of each row, likewise; not in older files

The metadata holds, under `omni_convert_moments`, the identity of the recording and, as `layers`, the name under which
each layer's tensors are stored. An input of width 4096 takes 64 MiB, a wider one 1 MiB per 512 columns: the file is at
most as large as the weights. Full moments are worth their size: blocks leave 1 to 15 % more output error.

Rows are rounded to bfloat16, whose products are exact in float32; their sums are rounded. So the last bits depend on
the machine and the number of threads. Files are merged by sums in float64 that are rounded once: the order of the files
does not matter, but merging a merged file may change the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from omni_convert.formats.containers.mapped_pages import give_up, scratch_zeros
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.containers.safetensors_writer import SafetensorsWriter
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CalibrationError, CheckpointError, OutputError
from omni_convert.formats.statistics.layer_statistics import SAMPLE_ROWS, InputRecorder, Observation
from omni_convert.formats.statistics.recording_header import Identity, RecordingHeader, RecordingKind, read_header
from omni_convert.formats.statistics.row_sample import merged_rows

__all__ = ["InputMoments", "Moments", "MomentsRecorder"]

METADATA_KEY = "omni_convert_moments"
KIND = RecordingKind(METADATA_KEY, "moments", "`omni-convert calibrate --moments FILE`")
#: Up to this width all of X^T X is kept (64 MiB), beyond only blocks on its diagonal.
MAX_FULL_WIDTH = 4096
BLOCK = 512
# Earlier versions did not record it.
RUNS = "row_runs"
# Elements of rows that are converted to float32 at a time.
TILE_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Second moments of one input.

    Attributes:
        products: X^T X or its diagonal blocks, float32 [blocks, size, size]
        count: number of rows X
        sample: some of the rows, bfloat16 [<= 64, in]
        sample_runs: prompt and denoising step of each of these, int64 [<= 64, 2]; None if they were not recorded
    """

    products: Tensor
    count: int
    sample: Tensor
    sample_runs: Tensor | None = None

    @property
    def width(self) -> int:
        return self.sample.shape[1]

    def blocks(self) -> list[Tensor]:
        """The diagonal blocks without padding, each float32 [columns, columns]."""
        size = self.products.shape[1]
        widths = [min(size, self.width - start) for start in range(0, self.width, size)]
        return [block[:width, :width] for block, width in zip(self.products, widths, strict=True)]

    def columns(self, start: int, stop: int) -> InputMoments:
        """The moments of some columns; blocks on the diagonal stay whole.

        Raises:
            CalibrationError: these would cut a block.
        """
        size = self.products.shape[1]
        if len(self.products) == 1:
            products = self.products[:, start:stop, start:stop]
        elif start % size or (stop % size and stop != self.width):
            raise CalibrationError(
                f"found moments in blocks of {size} columns, expected none that columns {start} to {stop - 1} cut; use "
                "--rounding nearest"
            )
        else:
            products = self.products[start // size : -(-stop // size)]
        return replace(self, products=products, sample=self.sample[:, start:stop])

    def without(self, rows: Tensor) -> InputMoments:
        """The moments without these rows, which they contain."""
        products = _add_products(self.products.clone(), rows, -1)
        return replace(self, products=products, count=self.count - len(rows))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the moments file, by suffix."""
        runs = {} if self.sample_runs is None else {"row_runs": self.sample_runs}
        return {"products": self.products, "count": torch.tensor([self.count]), "rows": self.sample, **runs}

    @staticmethod
    def merged(parts: Sequence[InputMoments]) -> InputMoments:
        """Merges moments; there is at least one part, and all have the same width."""
        if len(parts) == 1:
            return parts[0]
        products = parts[0].products.double()
        for part in parts[1:]:
            products += part.products
        sample, runs = merged_rows([(part.sample, part.sample_runs) for part in parts], SAMPLE_ROWS)
        return InputMoments(products.float(), sum(part.count for part in parts), sample, runs)


def _add_products(products: Tensor, rows: Tensor, times: int = 1) -> Tensor:
    """Adds X^T X of rows [rows, in] to moments [blocks, size, size], in place."""
    blocks, size, _ = products.shape
    values = rows.to(torch.bfloat16).float()
    values = torch.nn.functional.pad(values, (0, blocks * size - rows.shape[1])).view(len(rows), blocks, size)
    by_block = values.transpose(0, 1)  # [blocks, rows, size]
    return products.baddbmm_(by_block.transpose(1, 2), by_block, alpha=times)


def _shape(width: int) -> tuple[int, int, int]:
    """The shape [blocks, size, size] of the moments of an input of this width."""
    return (1, width, width) if width <= MAX_FULL_WIDTH else (-(-width // BLOCK), BLOCK, BLOCK)


class MomentsRecorder(InputRecorder):
    """Accumulates second moments as well as statistics."""

    def __init__(self, scratch: Path | None = None) -> None:
        """Begins without inputs.

        Args:
            scratch: folder for a file that holds the moments, so that they take memory only until `rest` is called
        """
        super().__init__()
        self._scratch = scratch
        self._products: Tensor | None = None
        self._at_rest: Tensor | None = None
        self._count = 0

    def record(self, observation: Observation, step: int, prompt: int = 0) -> None:
        super().record(observation, step, prompt)
        rows = observation.rows
        if self._products is None:
            self._products = self._begun(rows)
        for tile in torch.split(rows, max(1, TILE_ELEMENTS // rows.shape[1])):
            _add_products(self._products, tile)
        self._count += len(rows)

    def _begun(self, rows: Tensor) -> Tensor:
        """The moments so far, on the device of the rows."""
        shape = _shape(rows.shape[1])
        if self._scratch is None:
            return torch.zeros(shape, device=rows.device)
        if self._at_rest is None:
            self._at_rest = scratch_zeros(shape, self._scratch)
        return self._at_rest.to(rows.device)

    def rest(self) -> None:
        """Leaves the moments in their file, if they have one, until the next input comes."""
        if self._at_rest is None or self._products is None:
            return
        if self._products is not self._at_rest:
            self._at_rest.copy_(self._products)
        give_up(self._at_rest)
        self._products = None

    def moments(self) -> InputMoments | None:
        """The moments so far, on the CPU; None if nothing was recorded."""
        self.rest()
        statistics = self.statistics()
        products = self._products if self._at_rest is None else self._at_rest
        if statistics is None or products is None:
            return None
        return InputMoments(products.cpu(), self._count, statistics.rows(), statistics.row_runs())


#: Reads the moments of a layer: from memory, from a file, or by merging some.
Reader = Callable[[], InputMoments]


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the linear inputs of a pipeline; each layer's are read on demand.

    Attributes:
        identity: the model and the runs that they come from
        owners: `component.stem` → the layer under whose name its moments are stored; layers that read the same input
            have the same owner
        readers: owner → function that reads its moments
        fingerprints: identities of the files that they come from
    """

    identity: Identity
    owners: Mapping[str, str]
    readers: Mapping[str, Reader]
    fingerprints: tuple[str, ...] = ()

    @classmethod
    def recorded(cls, identity: Identity, layers: Mapping[str, InputMoments]) -> Moments:
        """Moments that are in memory; layers with the same object have the same owner."""
        first: dict[int, str] = {}
        owners = {name: first.setdefault(id(layers[name]), name) for name in sorted(layers)}
        return cls(identity, owners, {owner: partial(_same, layers[owner]) for owner in first.values()})

    def for_group(self, component: str, members: Iterable[str]) -> Reader | None:
        """A function that reads the moments of a fused group's input; None unless every member was recorded.

        Args:
            component: `transformer`, `text_encoder`, ...
            members: state-dict stems, without `.weight`
        """
        names = [f"{component}.{stem}" for stem in members]
        if not names or any(name not in self.owners for name in names):
            return None
        return partial(_merge_read, [self.readers[owner] for owner in dict.fromkeys(self.owners[n] for n in names)])

    def merge(self, others: Iterable[Moments]) -> Moments:
        """Merges these moments with others.

        Raises:
            CalibrationError: they belong to different models.
        """
        everything = [self, *others]
        if len(everything) == 1:
            return self
        identity = self.identity.merge(moments.identity for moments in everything[1:])
        first: dict[tuple[str | None, ...], str] = {}
        owners, readers = {}, {}
        for name in sorted({name for moments in everything for name in moments.owners}):
            found = tuple(moments.owners.get(name) for moments in everything)
            owners[name] = first.setdefault(found, name)
            if owners[name] == name:
                parts = zip(everything, found, strict=True)
                readers[name] = partial(_merge_read, [m.readers[owner] for m, owner in parts if owner is not None])
        return Moments(identity, owners, readers, tuple(sorted(f for m in everything for f in m.fingerprints)))

    def in_memory(self) -> Moments:
        """Reads and merges these moments now, so that their sources can be freed."""
        layers = {owner: read() for owner, read in self.readers.items()}
        return Moments.recorded(self.identity, {name: layers[owner] for name, owner in self.owners.items()})

    def fingerprint(self) -> str:
        """Identity of the files, computed from their headers, numbers of rows and samples."""
        return hashlib.sha256("".join(self.fingerprints).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the moments file, layer by layer; it appears when it is whole.

        Raises:
            OutputError: it cannot be written.
        """
        path = Path(path)
        partial_path = path.with_name(f"{path.name}.partial")
        metadata = {METADATA_KEY: RecordingHeader(self.identity, self.owners).to_text(KIND)}
        specs = [
            TensorSpec(f"{owner}.{suffix}", tensor.dtype, tuple(tensor.shape))
            for owner in sorted(self.readers)
            for suffix, tensor in self.readers[owner]().tensors().items()
        ]
        try:
            partial_path.unlink(missing_ok=True)
            with SafetensorsWriter(partial_path, specs, metadata) as writer:
                for owner in sorted(self.readers):
                    for suffix, tensor in self.readers[owner]().tensors().items():
                        writer.write(f"{owner}.{suffix}", tensor.contiguous())
                        give_up(tensor)
            partial_path.replace(path)
        except OSError as error:
            raise OutputError(f"{path}: moments cannot be written ({error.strerror})") from None
        finally:
            with contextlib.suppress(OSError):
                partial_path.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Opens a moments file; each layer is read on demand.

        Raises:
            CalibrationError: the file is missing, damaged, of a later version or no moments file.
        """
        path = Path(path)
        try:
            file = SafetensorsFile(path)
        except CheckpointError as error:
            raise CalibrationError(f"{error}; make one with `omni-convert calibrate --moments FILE`") from None
        header = read_header(path, file.metadata, KIND)
        owners = header.owners
        for owner in sorted(set(owners.values())):
            _check_layer(file, owner)
        readers = {owner: partial(_read_layer, file, owner) for owner in owners.values()}
        return cls(header.identity, dict(sorted(owners.items())), readers, (_file_fingerprint(file, owners.values()),))

    @classmethod
    def load_all(cls, paths: Sequence[str | Path]) -> Moments:
        """Opens moments files, at least one, and merges them; raises as `load` and `merge`."""
        first, *others = [cls.load(path) for path in paths]
        return first.merge(others)


def _same(moments: InputMoments) -> InputMoments:
    return moments


def _merge_read(readers: Sequence[Reader]) -> InputMoments:
    return InputMoments.merged([read() for read in readers])


def _check_layer(file: SafetensorsFile, owner: str) -> None:
    """Refuses a layer whose tensors are missing or have other dtypes or shapes."""
    rows = file.specs.get(f"{owner}.rows")
    shape = rows.shape if rows is not None and len(rows.shape) == 2 else (0, 0)
    expected = {
        "rows": (torch.bfloat16, (min(max(shape[0], 1), SAMPLE_ROWS), max(shape[1], 1))),
        "count": (torch.int64, (1,)),
        "products": (torch.float32, _shape(shape[1])),
    }
    if f"{owner}.{RUNS}" in file.specs:
        expected[RUNS] = (torch.int64, (shape[0], 2))
    for suffix, (dtype, wanted) in expected.items():
        spec = file.specs.get(f"{owner}.{suffix}")
        if spec is None or spec.dtype != dtype or spec.shape != wanted:
            found = "nothing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
            raise CalibrationError(
                f"{file.path}: {owner}.{suffix}: found {found}, expected {dtype} {list(wanted)}; calibrate again"
            )


def _read_layer(file: SafetensorsFile, owner: str) -> InputMoments:
    try:
        products, count, rows = (file.read(f"{owner}.{suffix}") for suffix in ("products", "count", "rows"))
        runs = file.read(f"{owner}.{RUNS}") if f"{owner}.{RUNS}" in file.specs else None
    except CheckpointError as error:
        raise CalibrationError(str(error)) from None
    if not bool(torch.isfinite(products).all()) or not bool(torch.isfinite(rows).all()) or int(count) < 1:
        raise CalibrationError(f"{file.path}: {owner}: found NaN, Inf or no rows; calibrate again")
    return InputMoments(products, int(count), rows, runs)


def _file_fingerprint(file: SafetensorsFile, owners: Iterable[str]) -> str:
    digest = hashlib.sha256(file.header_sha256.encode())
    for owner in sorted(set(owners)):
        for suffix in ("count", "rows"):
            name = f"{owner}.{suffix}"
            digest.update(file.read_bytes(name, 0, file.specs[name].nbytes))
    return digest.hexdigest()
