"""The base of formats of rotated weights (ConvRot): groups of columns are rotated before the weight is quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.rotation import LARGEST_GROUP, SMALLEST_GROUP, largest_rotation_group
from omni_convert.formats.format import QuantizingFormat

__all__ = ["RotatedFormat"]


@dataclass(frozen=True)
class RotatedFormat(QuantizingFormat):
    """A format of the rotated weight.

    Attributes:
        group: columns that are rotated together, a power of four
    """

    group: int = LARGEST_GROUP

    #: How the rotated weight is encoded.
    encoding_inside: ClassVar[Encoding]
    #: `in_features` have to be a multiple of it.
    column_multiple: ClassVar[int] = SMALLEST_GROUP

    def for_weight(self, shape: tuple[int, ...]) -> Self:
        return replace(self, group=largest_rotation_group(shape[1]))

    @property
    def encoding(self) -> Encoding:
        return replace(self.encoding_inside, rotation=self.group)

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if in_features % self.column_multiple:
            return f"{self.method} needs in_features % {self.column_multiple} == 0, found {in_features}"
        return None
