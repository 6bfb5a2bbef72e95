"""How dialects lay out on disk what a format defines: packed or not, swizzled, reciprocal, in another container.

A format has one set of tensors, which its own file describes; here they are called *canonical*. A codec turns rows of
one canonical tensor into rows of the stored one and back, without changing a value.

    canonical rows ── encode ──► stored rows        stored rows ── decode ──► canonical rows
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import NibbleOrder
from omni_convert.formats.arithmetic.e2m1_container import pack_container, unpack_container
from omni_convert.formats.arithmetic.swizzle import padded_scale_shape, swizzle_scales, unswizzle_scales
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.rows import TensorLayout

__all__ = [
    "PLAIN",
    "Codec",
    "Exponents",
    "OneForAll",
    "PackedValues",
    "PaddedRows",
    "Plain",
    "Reciprocal",
    "Repeated",
    "SwappedNibbles",
    "Swizzled",
    "Transposed",
    "WritableCodec",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
BYTES = (torch.uint8, torch.float8_e8m0fnu)


class Codec(ABC):
    """A layout on disk that can be read."""

    #: Rows of the stored tensor and canonical rows are made from each other only in multiples of this.
    row_multiple: int = 1

    @abstractmethod
    def stored(self, layout: TensorLayout) -> TensorLayout:
        """Dtype and shape of the stored tensor for a canonical one."""

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        """The dtype and shape that a stored tensor should have, if it cannot be decoded to `layout`; else None."""
        expected = self.stored(layout)
        if spec.dtype is expected.dtype and spec.shape == expected.shape:
            return None
        return f"{expected.dtype} {list(expected.shape)}".removeprefix("torch.")

    @abstractmethod
    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        """Stored rows to canonical ones; only dtype and columns of `layout` matter."""

    @property
    def on_disk(self) -> Codec:
        """The codec without the settings that only writing needs."""
        return self

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        """Canonical rows `start` to `stop` of a stored tensor; all of one that belongs to the whole weight."""
        if not layout.rows_per_entry:
            return self.decode(checkpoint.read(name), layout)
        first = start // self.row_multiple * self.row_multiple
        last = min(-(-stop // self.row_multiple) * self.row_multiple, checkpoint[name].shape[0])
        return self.decode(checkpoint.read_rows(name, first, last), layout)[start - first : stop - first]


class WritableCodec(Codec):
    """A layout on disk that can be read and written."""

    #: Rows of the stored tensor are not rows of the canonical one, so it is encoded as a whole.
    is_turned: bool = False

    @abstractmethod
    def encode(self, tensor: Tensor) -> Tensor:
        """Canonical rows (all, of a tensor that belongs to the whole weight) to stored ones."""

    def loss(self, tensor: Tensor) -> str | None:
        """Why decoding would not give these canonical numbers back, or None."""
        return None


@dataclass(frozen=True)
class Plain(WritableCodec):
    """The canonical tensor, perhaps in another shape or container dtype.

    Reading accepts any shape with as many elements, floats in any dtype that float32 holds exactly, and
    E8M0 bytes under either name.

    Attributes:
        dtype: of the container; None for the canonical one
        shape: on disk, where it is not the canonical one; -1 stands for the rows
    """

    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None

    def stored(self, layout: TensorLayout) -> TensorLayout:
        shape = layout.shape
        if self.shape is not None:
            shape = tuple(layout.shape[0] if size == -1 else size for size in self.shape)
        return replace(layout, dtype=self.dtype or layout.dtype, shape=shape)

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        allowed = next((group for group in (FLOATS, BYTES) if layout.dtype in group), (layout.dtype,))
        rows_fit = not layout.rows_per_entry or (bool(spec.shape) and spec.shape[0] == layout.shape[0])
        if spec.dtype in allowed and spec.elements == math.prod(layout.shape) and rows_fit:
            return None
        return super().mismatch(spec, layout)

    def encode(self, tensor: Tensor) -> Tensor:
        if self.dtype is not None and self.dtype is not tensor.dtype:
            tensor = tensor.view(self.dtype) if self.dtype.itemsize == 1 else tensor.to(self.dtype)
        if self.shape is None:
            return tensor
        return tensor.reshape([len(tensor) if size == -1 else size for size in self.shape])

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        tensor = stored
        if stored.dtype is not layout.dtype:
            tensor = stored.view(layout.dtype) if layout.dtype.itemsize == 1 else stored.to(layout.dtype)
        if not layout.rows_per_entry:
            return tensor.reshape(layout.shape)
        return tensor.reshape(stored.shape[0], *layout.shape[1:])

    def loss(self, tensor: Tensor) -> str | None:
        if self.dtype in (torch.bfloat16, torch.float16) and not torch.equal(tensor.to(self.dtype).float(), tensor):
            return f"its values do not fit {DTYPE_NAMES[self.dtype]}"
        return None


PLAIN = Plain()


@dataclass(frozen=True)
class SwappedNibbles(WritableCodec):
    """Two codes a byte with the even element in the high nibble; canonical is the low one."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return layout

    def encode(self, tensor: Tensor) -> Tensor:
        return (tensor << 4) | (tensor >> 4)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return self.encode(stored)


@dataclass(frozen=True)
class PackedValues(WritableCodec):
    """Two E2M1 codes a byte; canonical are their values in an E4M3 container."""

    even: NibbleOrder = "low"

    def stored(self, layout: TensorLayout) -> TensorLayout:
        *others, columns = layout.shape
        return replace(layout, dtype=torch.uint8, shape=(*others, -(-columns // 2)))

    def encode(self, tensor: Tensor) -> Tensor:
        return _in_order(pack_container(tensor), self.even)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        *others, width = stored.shape
        rows = _in_order(stored, self.even).reshape(-1, width)
        return unpack_container(rows, layout.shape[-1]).view(*others, layout.shape[-1])


def _in_order(packed: Tensor, even: NibbleOrder) -> Tensor:
    """Packed codes from one order of nibbles to the low one first, or back."""
    return packed if even == "low" else (packed << 4) | (packed >> 4)


@dataclass(frozen=True)
class Exponents(Codec):
    """E8M0 bytes where the format has float32 numbers; only read."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return replace(layout, dtype=torch.uint8)

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        return None if spec.dtype in BYTES and spec.shape == layout.shape else super().mismatch(spec, layout)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return stored.view(torch.float8_e8m0fnu).to(layout.dtype)


@dataclass(frozen=True)
class Swizzled(WritableCodec):
    """Block scales in the order of cuBLAS, padded to whole tiles; canonical is linear.

    Attributes:
        dtype: of the container; None for the canonical one
    """

    dtype: torch.dtype | None = None

    row_multiple = 128

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        return replace(layout, dtype=self.dtype or layout.dtype, shape=padded_scale_shape(rows, columns))

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        expected = self.stored(layout)
        allowed = BYTES if layout.dtype in BYTES else (layout.dtype,)
        if spec.dtype in allowed and spec.shape == expected.shape:
            return None
        return super().mismatch(spec, layout)

    def encode(self, tensor: Tensor) -> Tensor:
        return swizzle_scales(tensor).view(self.dtype or tensor.dtype)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return unswizzle_scales(stored, stored.shape[0], layout.shape[1]).view(layout.dtype)


@dataclass(frozen=True)
class PaddedRows(Codec):
    """A tensor below whose rows there are more that mean nothing; only read.

    Attributes:
        rows: all that are stored
        inner: the layout of the rows
    """

    rows: int
    inner: Codec = PLAIN

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return self.inner.stored(self._padded(layout))

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        return self.inner.mismatch(spec, self._padded(layout))

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return self.inner.decode(stored, layout)

    def _padded(self, layout: TensorLayout) -> TensorLayout:
        return replace(layout, shape=(self.rows, *layout.shape[1:]))


@dataclass(frozen=True)
class Reciprocal(WritableCodec):
    """One over the number, as one element."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return replace(layout, shape=(1,))

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        return None if spec.dtype in FLOATS and spec.elements == 1 else super().mismatch(spec, layout)

    def encode(self, tensor: Tensor) -> Tensor:
        number = float(tensor)
        nearest = (1.0 / tensor.double()).float().reshape(1)
        around = [nearest, *(torch.nextafter(nearest, torch.tensor([bound])) for bound in (0.0, torch.inf))]
        return next((each for each in around if _inverse(each) == number), nearest)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return (1.0 / stored.double()).to(layout.dtype).reshape(layout.shape)

    def loss(self, tensor: Tensor) -> str | None:
        if _inverse(self.encode(tensor)) == float(tensor):
            return None
        return f"no float32 has exactly the reciprocal {float(tensor):.9g}"


def _inverse(number: Tensor) -> float:
    return float((1.0 / number.double()).float())


@dataclass(frozen=True)
class Repeated(WritableCodec):
    """A scalar written once for each row.

    Attributes:
        shape: of the stored tensor, [rows] or [rows, 1]
    """

    shape: tuple[int, ...]

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return replace(layout, shape=self.shape)

    def encode(self, tensor: Tensor) -> Tensor:
        return tensor.reshape([1] * len(self.shape)).expand(self.shape).contiguous()

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return stored.flatten()[0].to(layout.dtype)


@dataclass(frozen=True)
class OneForAll(Codec):
    """A scalar where the format has a number for each row; only read."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return replace(layout, shape=(), rows_per_entry=0)

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        return None if spec.dtype in FLOATS and spec.elements == 1 else super().mismatch(spec, layout)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return stored.flatten()[0].to(layout.dtype)

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        return self.decode(checkpoint.read(name), layout).expand(stop - start, *layout.shape[1:]).contiguous()


@dataclass(frozen=True)
class Transposed(WritableCodec):
    """The rows of the weight are columns on disk.

    Attributes:
        dtype: of the container; None for the canonical one
        row_multiple: all rows of the weight, to write them
    """

    dtype: torch.dtype | None = None
    row_multiple: int = 1

    is_turned = True

    @property
    def on_disk(self) -> Codec:
        return replace(self, dtype=None, row_multiple=1)

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return replace(layout, dtype=self.dtype or layout.dtype, shape=layout.shape[::-1])

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        fits = spec.dtype in FLOATS and spec.shape == layout.shape[::-1]
        return None if fits else super().mismatch(spec, layout)

    def encode(self, tensor: Tensor) -> Tensor:
        turned = tensor.T.to(self.dtype or tensor.dtype).contiguous()
        if turned.dtype is not tensor.dtype and not turned.T.to(tensor.dtype).equal(tensor):
            found = str(turned.dtype).removeprefix("torch.")
            raise CheckpointError(f"found scales that {found} rounds, expected numbers that it holds")
        return turned

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return stored.T.to(layout.dtype).contiguous()

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        if not layout.rows_per_entry:
            return self.decode(checkpoint.read(name), layout)
        return self.decode(checkpoint.read_columns(name, start, stop), layout)
