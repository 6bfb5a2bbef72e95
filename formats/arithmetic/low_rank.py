"""The largest singular directions of a matrix that is read in tiles of rows, by randomized subspace iteration.

For A [rows, in] a basis V [in, r] is improved by V' = orth(A^T A V), one pass over the tiles each; neither A nor A^T A
is ever whole in memory (Halko, Martinsson and Tropp, arXiv 0909.4061). What A leaves in the basis tells its largest
directions there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OVERSAMPLING", "SubspacePass", "first_basis", "orthonormal"]

#: Directions beyond the rank that make the rank's own accurate.
OVERSAMPLING = 8
SEED = 0


@dataclass
class SubspacePass:
    """One pass over the rows of a matrix.

    Attributes:
        basis: orthonormal columns, float32 [in, r]
    """

    basis: Tensor

    def __post_init__(self) -> None:
        self._turned = torch.zeros_like(self.basis)
        self._gram = torch.zeros(self.basis.shape[1], self.basis.shape[1], device=self.basis.device)

    def add(self, rows: Tensor) -> None:
        """Takes rows of the matrix, float32 [rows, in]."""
        seen = rows @ self.basis
        self._turned.addmm_(rows.T, seen)
        self._gram.addmm_(seen.T, seen)

    def largest(self, rank: int) -> Tensor:
        """The directions in the basis with the most of the matrix, orthonormal, float32 [in, rank]."""
        _, vectors = torch.linalg.eigh(self._gram.double())
        directions: Tensor = vectors[:, -rank:].flip(1).float()
        return self.basis @ directions

    def next_basis(self) -> Tensor:
        """The basis for the next pass."""
        return orthonormal(self._turned)


def first_basis(columns: int, rank: int, device: torch.device) -> Tensor:
    """A random basis to start from, the same every time, float32 [columns, rank + OVERSAMPLING]."""
    generator = torch.Generator().manual_seed(SEED)
    size = min(columns, rank + OVERSAMPLING)
    return orthonormal(torch.randn(columns, size, generator=generator)).to(device)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of columns, [in, r]."""
    basis, _ = torch.linalg.qr(columns)
    found: Tensor = basis
    return found
