"""Groups of numbers that share a scale, arranged for searches over many of them at once.

The positions of a group come first, `[positions, groups, blocks]`, so that a sum over a group adds long rows. Sums pair
rows in a fixed order, and nothing fuses a product with a sum. So the bytes of a block depend neither on the blocks
beside it nor on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Groups", "round_to_half", "safe_inverse", "select", "smallest", "sum_positions"]

# Low bits of an error that hold the number of its candidate instead; 17 bits are left for the error.
CANDIDATE_BITS = 6


@dataclass(frozen=True)
class Groups:
    """The numbers of some blocks, and the weight of the squared error at each of them.

    Attributes:
        values: float32 [positions, groups, blocks]; positions are a power of two
        weights: as values; None weights all numbers alike
        scratch: three buffers of the same shape, which operations overwrite
        weighted: values times weights
    """

    values: Tensor
    weights: Tensor | None
    scratch: tuple[Tensor, Tensor, Tensor] = field(init=False)
    weighted: Tensor = field(init=False)

    def __post_init__(self) -> None:
        buffers = tuple(torch.empty_like(self.values) for _ in range(3))
        object.__setattr__(self, "scratch", buffers)
        weighted = self.values if self.weights is None else self.values * self.weights
        object.__setattr__(self, "weighted", weighted)

    @classmethod
    def of_blocks(cls, blocks: Tensor, weights: Tensor | None, positions: int) -> Groups:
        """Groups of consecutive numbers of each block.

        Args:
            blocks: float [blocks, numbers]
            weights: as blocks, or None
            positions: numbers of a group
        """

        def arranged(numbers: Tensor) -> Tensor:
            return numbers.reshape(len(numbers), -1, positions).permute(2, 1, 0).float().contiguous()

        return cls(arranged(blocks), None if weights is None else arranged(weights))

    def weigh(self, buffer: Tensor) -> Tensor:
        """Multiplies a buffer with the weights, in place."""
        return buffer if self.weights is None else buffer.mul_(self.weights)

    def squares(self) -> Tensor:
        """The weighted sum of squares of each group [groups, blocks]."""
        return sum_positions(torch.mul(self.values, self.weighted, out=self.scratch[0])).clone()

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """The sum of the weights and the weighted sum of the numbers of each group, both [groups, blocks]."""
        weights = torch.ones_like(self.values) if self.weights is None else self.weights.clone()
        return sum_positions(weights).clone(), sum_positions(self.weighted.clone()).clone()


def sum_positions(buffer: Tensor) -> Tensor:
    """Sums along the first dimension, a power of two, pairwise; overwrites the buffer and returns its first row."""
    count = len(buffer)
    while count > 1:
        count //= 2
        buffer[:count].add_(buffer[count : 2 * count])
    return buffer[0]


def safe_inverse(numbers: Tensor) -> Tensor:
    """Reciprocals, with 0 for 0."""
    return torch.where(numbers == 0, 0.0, numbers.reciprocal())


def round_to_half(numbers: Tensor) -> Tensor:
    """Numbers as FP16 stores them, in float32; zeros lose their sign."""
    return numbers.to(torch.float16).float().add_(0.0)


def smallest(errors: Tensor) -> Tensor:
    """The first candidate with the smallest error, of errors that differ by less than a part in 100,000.

    Args:
        errors: float32 [candidates, ...], not negative, at most 64 candidates; overwritten

    Returns:
        int64 [...]
    """
    # Non-negative floats have the same order as their bits, so the lowest bits can hold the candidate's number.
    bits = errors.view(torch.int32)
    mask = (1 << CANDIDATE_BITS) - 1
    numbers = torch.arange(len(errors), dtype=torch.int32, device=errors.device)
    bits.bitwise_and_(~mask).bitwise_or_(numbers.view(-1, *[1] * (errors.dim() - 1)))
    return bits.amin(dim=0).bitwise_and_(mask).long()


def select(candidates: Tensor, index: Tensor) -> Tensor:
    """Picks the candidate [candidates, ...] that an index [...] names at each place."""
    return candidates.gather(0, index[None])[0]
