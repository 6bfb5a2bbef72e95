"""The config of a model from the shapes of its tensors, for files without one; under diffusers' names or original ones.

Some settings show in no shape, such as the axes of rotary embeddings. Their published values count for models of
published sizes, and are not decided for others.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.original_names import OriginalName, names_of

__all__ = ["ConfigRule", "DerivedConfig", "Shapes", "rotary_axes"]


def rotary_axes(channels: int) -> list[int]:
    """The axes of rotary embeddings of an image's or a video's positions, as most models divide a head's channels."""
    return [channels // 8, 7 * channels // 16, 7 * channels // 16]


class Shapes:
    """Shapes of tensors by their names in diffusers, whichever names the file has."""

    def __init__(self, stored: Mapping[str, TensorSpec], table: Sequence[OriginalName]) -> None:
        self._stored, self._table = stored, table

    def find(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, of the whole where the file joins it with others; None if it is not there."""
        names = (name, *names_of(self._table, name))
        return next((self._stored[each].shape for each in names if each in self._stored), None)

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def rows(self, name: str) -> int:
        """The first dimension; raises LookupError if the tensor is not there."""
        return self._size(name, 0)

    def columns(self, name: str) -> int:
        """The second dimension; raises LookupError if there is none."""
        return self._size(name, 1)

    def columns_if_any(self, name: str) -> int | None:
        return self.columns(name) if name in self else None

    def count(self, name: str) -> int:
        """The number of blocks that have the tensor; `{}` stands for a block's number."""
        number = 0
        while name.format(number) in self:
            number += 1
        return number

    def numbers(self, name: str, count: int) -> list[int]:
        """The blocks, of so many, that have the tensor."""
        return [number for number in range(count) if name.format(number) in self]

    def _size(self, name: str, dimension: int) -> int:
        shape = self.find(name)
        if shape is None:
            raise LookupError(name)
        return shape[dimension]


@dataclass(frozen=True)
class DerivedConfig:
    """A config that follows from shapes.

    Attributes:
        config: the settings
        undecided: keys whose values there are only the usual ones
    """

    config: dict[str, Any]
    undecided: tuple[str, ...]


@dataclass(frozen=True)
class ConfigRule:
    """How the config of a class follows from the shapes of its tensors.

    Attributes:
        model_class: the class in diffusers
        signs: tensors of diffusers that only this model has, all of them
        settings: the settings from shapes; raises LookupError if these are not those of the model
        undecided: setting that shows in no shape → the settings of published models, for which its value is the usual
            one
        spare: beginnings of names of tensors that the class does without
    """

    model_class: str
    signs: tuple[str, ...]
    settings: Callable[[Shapes], dict[str, Any]]
    undecided: Mapping[str, Mapping[str, Container[Any]]] = field(default_factory=dict)
    spare: tuple[str, ...] = ()

    def derive(self, shapes: Shapes) -> DerivedConfig | None:
        """The config of a model with these shapes; None if they are not those of the class."""
        if not all(sign in shapes for sign in self.signs):
            return None
        try:
            settings = self.settings(shapes)
        except LookupError:
            return None
        undecided = tuple(
            key
            for key, published in self.undecided.items()
            if not published or not all(settings[known] in values for known, values in published.items())
        )
        return DerivedConfig({"_class_name": self.model_class, **settings}, undecided)
