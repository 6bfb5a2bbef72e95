"""How a LoRA file changes a weight W [out, in], for some of its rows at a time. Kernels of convolutions lie flat.

    LoRA     W' = W + s up @ down
    LoHa     W' = W + s (up_1 @ down_1) * (up_2 @ down_2)
    LoKr     W' = W + s w1 ⊗ w2
    full     W' = W + s D
    DoRA     W' = m V / |V| with V = W + one of these; |V| is the norm of each row, or of each column
    OFT      W' = R W or W R, where R has blocks of rotations on its diagonal

The user's strength scales the difference W' - W, whatever the algorithm. Sums are taken in float64.

Sources: PEFT 0.21 (`tuners/{lora,loha,lokr,oft}/layer.py`) and LyCORIS 4.1 (`lycoris/functional`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "Addition",
    "Change",
    "Decomposition",
    "Delta",
    "Difference",
    "Hadamard",
    "InputRotation",
    "Kronecker",
    "LowRank",
    "OutputRotation",
]


class Delta(ABC):
    """A matrix that is added to a weight, kept as its factors in the dtype in which they were trained."""

    shape: tuple[int, int]

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Float64 [stop - start, in]."""


@dataclass(frozen=True)
class LowRank(Delta):
    """A product of two matrices: `down` [rank, in], `up` [out, rank]."""

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the factors
        return self.up.shape[0], self.down.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.up[start:stop].double() @ self.down.double()


@dataclass(frozen=True)
class Hadamard(Delta):
    """The elementwise product of two matrices."""

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the factors
        return self.first.shape

    def rows(self, start: int, stop: int) -> Tensor:
        return self.first.rows(start, stop) * self.second.rows(start, stop)


@dataclass(frozen=True)
class Kronecker(Delta):
    """The Kronecker product of two matrices.

    Attributes:
        outer: [a, c]
        inner: [b, d, ...]; kernels of convolutions have more dimensions
    """

    outer: Tensor
    inner: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the factors
        return self.outer.shape[0] * self.inner.shape[0], self.outer.shape[1] * self.inner[0].numel()

    def rows(self, start: int, stop: int) -> Tensor:
        numbers = torch.arange(start, stop)
        outer = self.outer[numbers // self.inner.shape[0]].double()  # [rows, c]
        inner = self.inner[numbers % self.inner.shape[0]].double().flatten(1)  # [rows, d * kernel]
        return (outer[:, :, None] * inner[:, None, :]).flatten(1)


@dataclass(frozen=True)
class Difference(Delta):
    """A difference that is stored as a whole, of a weight or of any other tensor."""

    difference: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the tensor
        return self.difference.shape[0], self.difference[0].numel()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.difference[start:stop].double().reshape(stop - start, -1)


class Change(ABC):
    """A change of a weight.

    Attributes:
        shape: of the weight that it fits, [out, in]
        height: number of consecutive rows that must be changed together
        needs_all_rows: it looks at the whole weight, and so cannot be cut into those that the weight joins
    """

    shape: tuple[int, int]
    height: int = 1
    needs_all_rows: bool = False

    @abstractmethod
    def apply(self, weight: Tensor, start: int, chunks: Iterator[Tensor]) -> Tensor:
        """The changed rows.

        Args:
            weight: float64 [rows, in], the rows from `start` on
            chunks: the whole weight before the change, some rows at a time
        """


@dataclass(frozen=True)
class Addition(Change):
    """A matrix that is added with a scale, which includes the user's strength."""

    delta: Delta
    scale: float

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the matrix
        return self.delta.shape

    def apply(self, weight: Tensor, start: int, chunks: Iterator[Tensor]) -> Tensor:
        return weight + self.delta.rows(start, start + len(weight)) * self.scale


@dataclass(frozen=True)
class Decomposition(Change):
    """A sum whose rows or columns get trained norms.

    Attributes:
        delta: what is added before
        scale: of `delta`, without the user's strength
        magnitude: norms [out, 1] or [1, in]
        strength: the user's
        norms: the norms of the columns, once somebody needed them
    """

    delta: Delta
    scale: float
    magnitude: Tensor
    strength: float
    norms: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the matrix
        return self.delta.shape

    @property
    def needs_all_rows(self) -> bool:  # type: ignore[override]  # follows from the norms
        return self.magnitude.shape[1] > 1

    def apply(self, weight: Tensor, start: int, chunks: Iterator[Tensor]) -> Tensor:
        total = self._sum(weight, start)
        magnitude = self.magnitude.double()
        if magnitude.shape[1] == 1:
            magnitude, norm = magnitude[start : start + len(weight)], total.norm(dim=1, keepdim=True)
        else:
            norm = self._column_norms(chunks)
        changed: Tensor = total * (magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        return weight + self.strength * (changed - weight)

    def _sum(self, weight: Tensor, start: int) -> Tensor:
        return weight + self.delta.rows(start, start + len(weight)) * self.scale

    def _column_norms(self, chunks: Iterator[Tensor]) -> Tensor:
        """Float64 [1, in]."""
        if not self.norms:
            squares, start = torch.zeros(1, self.shape[1], dtype=torch.float64), 0
            for chunk in chunks:
                squares += self._sum(chunk, start).square().sum(dim=0, keepdim=True)
                start += len(chunk)
            self.norms.append(squares.sqrt())
        return self.norms[0]


@dataclass(frozen=True)
class OutputRotation(Change):
    """Rotations of blocks of rows.

    Attributes:
        blocks: float64 [blocks, height, height]; row `m` of the result is the sum over `n` of R[n, m] times row `n`
        rescale: factors of the rows afterwards, [out], if there are any
        columns: in
    """

    blocks: Tensor
    rescale: Tensor | None
    columns: int
    strength: float

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the blocks
        return self.blocks.shape[0] * self.height, self.columns

    @property
    def height(self) -> int:  # type: ignore[override]  # follows from the blocks
        return self.blocks.shape[1]

    def apply(self, weight: Tensor, start: int, chunks: Iterator[Tensor]) -> Tensor:
        stop = start + len(weight)
        blocks = self.blocks[start // self.height : stop // self.height]
        changed: Tensor = (blocks.transpose(1, 2) @ weight.view(-1, self.height, self.columns)).flatten(0, 1)
        if self.rescale is not None:
            changed = changed * self.rescale[start:stop].double().reshape(-1, 1)
        return weight + self.strength * (changed - weight)


@dataclass(frozen=True)
class InputRotation(Change):
    """Rotations of blocks of columns.

    Attributes:
        blocks: float64 [blocks, n, n]; column `k` of the result is the sum over `c` of R[k, c] times column `c`
        rows: out
    """

    blocks: Tensor
    rows: int
    strength: float

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # follows from the blocks
        return self.rows, self.blocks.shape[0] * self.blocks.shape[1]

    def apply(self, weight: Tensor, start: int, chunks: Iterator[Tensor]) -> Tensor:
        parts = weight.view(len(weight), *self.blocks.shape[:2])
        changed = torch.einsum("nkc,rnc->rnk", self.blocks, parts).flatten(1)
        return weight + self.strength * (changed - weight)
