"""The rotation of ConvRot: rows of a weight, and inputs, times a regular Hadamard matrix in groups of columns.

The matrix is symmetric and its own inverse, so that one function rotates and rotates back. All of its rows and columns
have the sum 1: a constant offset is not gathered in one column.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "LARGEST_GROUP",
    "SMALLEST_GROUP",
    "hadamard",
    "is_rotation_group",
    "largest_rotation_group",
    "rotate",
    "rotate_inputs",
]

#: Columns of a group for which readers have fast kernels, and the fewest that they all accept.
LARGEST_GROUP, SMALLEST_GROUP = 256, 16


def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of a power of four, divided by its root, float32 [size, size]."""
    block = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, block)
    return matrix / math.sqrt(size)


def rotate(values: Tensor, group: int) -> Tensor:
    """Rotates groups of columns: any float dtype [..., K] to float32 [..., K]; `group` divides K."""
    groups = values.float().reshape(-1, group)
    return (groups @ hadamard(group).to(values.device)).view(values.shape)


def rotate_inputs(values: Tensor, group: int, memory: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Does the same as `rotate` in a third of the time; sums are in another order than for weights in files.

    Args:
        values: any float dtype [..., K]
        group: columns of a group, which divides K
        memory: two float32 tensors of the shape of `values`, overwritten: the result, and one to compute in
    """
    out, work = memory or (values.new_empty(values.shape, dtype=torch.float32) for _ in range(2))
    part = group // 4
    matrix = (hadamard(part) / 2).to(values.device)
    torch.mm(out.copy_(values).view(-1, part), matrix, out=work.view(-1, part))
    quarters, rotated = work.view(-1, 4, part), out.view(-1, 4, part)
    total = quarters.sum(dim=1)
    for index in range(4):
        torch.sub(total, quarters[:, 3 - index], alpha=2, out=rotated[:, index])
    return out


def is_rotation_group(size: int, columns: int) -> bool:
    """Whether groups of this size can be rotated and fill a row."""
    power = size
    while power > 1 and power % 4 == 0:
        power //= 4
    return power == 1 < size and columns % size == 0


def largest_rotation_group(columns: int) -> int:
    """The largest power of four that divides a number of columns, at most `LARGEST_GROUP`."""
    size = LARGEST_GROUP
    while columns % size:
        size //= 4
    return size
