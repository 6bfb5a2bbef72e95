"""How a quantized weight encodes numbers: a value that formats state, and that others compare instead of classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omni_convert.formats.arithmetic.element import ElementType, IntegerType

__all__ = ["E8M0", "PER_ROW", "PER_TENSOR", "Block", "Encoding"]

#: Rows and columns that share a scale; None stands for all of them.
Block = tuple[int | None, int | None]
PER_TENSOR: Block = (None, None)
PER_ROW: Block = (1, None)
#: dtype of a scale that is a power of two. Files hold its bytes as U8.
E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Encoding:
    """The elements of a weight and their scales.

    Attributes:
        element: type of the elements
        scale: dtype of the scales next to the elements
        block: rows and columns that share such a scale
        outer_block: rows and columns that share a second, float32 scale; None if there is no second level
        has_zero_point: a zero point is subtracted from codes before they are scaled
        is_symmetric: zero stands in the middle of the codes, as for all encodings without zero points
        is_smoothed: inputs are multiplied by `mul_scale`, by which the columns of the weight were divided
        rotation: columns that were rotated together; None if the weight was not rotated
    """

    element: ElementType | IntegerType
    scale: torch.dtype = torch.float32
    block: Block = PER_TENSOR
    outer_block: Block | None = None
    has_zero_point: bool = False
    is_symmetric: bool = True
    is_smoothed: bool = False
    rotation: int | None = None

    @property
    def has_byte_scales(self) -> bool:
        """Whether the scales next to the elements have one byte each."""
        return self.scale.itemsize == 1

    @property
    def has_unsigned_codes(self) -> bool:
        """Whether codes are integers from 0 up."""
        return isinstance(self.element, IntegerType) and not self.element.is_signed

    @property
    def block_size(self) -> tuple[int, int] | None:
        """Rows and columns of a block; None where a scale serves whole rows or columns."""
        rows, columns = self.block
        return None if rows is None or columns is None else (rows, columns)
