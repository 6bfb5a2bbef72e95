"""Codes of quantized weights in a checkpoint, with the scales beside them, where nothing declares what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from omni_convert.formats.containers.names import CODES, COMPANIONS, LOW_BIT
from omni_convert.formats.containers.tensor_spec import TensorSpec

__all__ = ["UndeclaredCodes", "holds_codes", "undeclared_codes"]


@dataclass(frozen=True)
class UndeclaredCodes:
    """A tensor of codes.

    Attributes:
        companions: suffixes of the tensors beside it that only make sense with codes
    """

    spec: TensorSpec
    stem: str
    companions: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.spec.name


def holds_codes(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor of two or more dimensions has the name and the dtype of codes."""
    return name.rpartition(".")[2] in CODES and spec.dtype in LOW_BIT and len(spec.shape) >= 2


def undeclared_codes(specs: Mapping[str, TensorSpec]) -> Iterator[UndeclaredCodes]:
    """Every tensor that `holds_codes`, as if nothing were declared about any of them."""
    for name, spec in specs.items():
        if holds_codes(name, spec):
            stem = name.rpartition(".")[0]
            yield UndeclaredCodes(spec, stem, tuple(each for each in COMPANIONS if f"{stem}.{each}" in specs))
