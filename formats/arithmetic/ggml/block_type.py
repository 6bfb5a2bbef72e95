"""The contract of GGUF's block types: a fixed count of numbers along K becomes a fixed count of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BitPlane", "BlockType", "half_at", "half_bytes"]


class BlockType(ABC):
    """One type of blocks."""

    #: Numbers of a block.
    numbers: int = 32
    #: Bytes of a block.
    size: int

    def uses_importance(self, *, search: bool) -> bool:
        """Whether `quantize` weights errors; otherwise the scale follows from the largest number."""
        return True

    @abstractmethod
    def quantize(self, blocks: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
        """Encodes blocks of numbers; the bytes of a block do not depend on the blocks beside it.

        Args:
            blocks: float [n, numbers]
            importance: weight of the squared error at each number, float [n, numbers]; None weights all alike. See
                `uses_importance`.
            search: find the scales with the smallest error; False takes a faster way to good ones

        Returns:
            uint8 [n, size]
        """

    @abstractmethod
    def dequantize(self, blocks: Tensor) -> Tensor:
        """Uint8 [n, size] to float32 [n, numbers], exactly as the `gguf` package computes them."""

    @abstractmethod
    def scale_and_minimum(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale of each element, and what is subtracted from their product: number = scale * element - minimum.

        Returns:
            float32, both broadcast to [n, numbers]; None if nothing is subtracted
        """

    @abstractmethod
    def nearest(self, values: Tensor) -> Tensor:
        """The elements nearest to numbers over their scales, float32 of any shape."""

    @abstractmethod
    def with_elements(self, blocks: Tensor, elements: Tensor) -> Tensor:
        """Blocks, uint8 [n, size], with other elements, float32 [n, numbers], on the same grid."""

    @abstractmethod
    def is_finite(self, blocks: Tensor) -> bool:
        """Whether all scales and minima are numbers."""


def half_bytes(numbers: Tensor) -> Tensor:
    """Float32 [n, 1] to the two bytes of FP16 [n, 2]."""
    return numbers.to(torch.float16).view(torch.uint8)


def half_at(blocks: Tensor, at: int) -> Tensor:
    """The FP16 at a byte of each block, float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


@dataclass(frozen=True)
class BitPlane:
    """The place of some bits of a block's codes. Codes that share a byte differ in one index.

    Attributes:
        shape: shape into which the codes of a block are arranged, in their order
        axis: axis along which the codes of a byte lie; the first code has the lowest bits
    """

    shape: tuple[int, ...]
    axis: int

    @property
    def bits(self) -> int:
        """Bits of each code."""
        return 8 // self.shape[self.axis]

    def pack(self, codes: Tensor) -> Tensor:
        """The low bits of codes uint8 [codes, n] in bytes [codes * bits / 8, n]."""
        together = codes.view(*self.shape, -1).movedim(self.axis, 0)
        mask = (1 << self.bits) - 1
        packed = together[0] & mask
        for i in range(1, len(together)):
            packed |= (together[i] & mask) << (i * self.bits)
        return packed.reshape(-1, codes.shape[1])

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, uint8 [codes, n]."""
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        together = packed.reshape(*rest, -1)
        mask = (1 << self.bits) - 1
        parts = [(together >> (i * self.bits)) & mask for i in range(self.shape[self.axis])]
        return torch.stack(parts, dim=self.axis).reshape(-1, packed.shape[1])
