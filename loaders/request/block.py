"""The `quantization_config` of a component's config.json, as the libraries that load the component want it wrapped."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from typing import Any, Self

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects import auto_round, omni_convert
from omni_convert.formats.dialects.config_block import read_block
from omni_convert.formats.int4 import DEFAULT_GROUP, Int4

__all__ = ["ConfigBlock", "QuantMethod"]


class QuantMethod(StrEnum):
    """The name of our quantizers. Libraries demand an Enum member, not a string."""

    OMNI_CONVERT = omni_convert.QUANT_METHOD


class ConfigBlock(ABC):
    """A block as an object, for the config classes of diffusers and transformers; saved again exactly as it was read.

    Mixed into their `QuantizationConfigMixin`, whose constructors take each key as an argument and lose unknown ones.
    """

    quant_method = QuantMethod.OMNI_CONVERT

    def __init__(self, block: Mapping[str, Any], meaning: QuantizationConfig | None = None) -> None:
        """A block as it was read.

        Args:
            meaning: what it means, where that is known already
        """
        self.block = copy.deepcopy(dict(block))
        self._meaning = meaning

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, config: QuantizationConfig) -> Self:
        """The block that says this, in the spelling of the library."""
        return cls(cls._spelled(config, ()))

    def say(self, config: QuantizationConfig, layers: Collection[str]) -> None:
        """Says this from now on, of these layers."""
        self.block = self._spelled(config, layers)
        self._meaning = None

    @classmethod
    def _spelled(cls, config: QuantizationConfig, layers: Collection[str]) -> dict[str, Any]:
        if config.method != Int4.method:
            return cls.spell(config)
        return auto_round.to_block(config.group_size or DEFAULT_GROUP, layers, config.ignored_layers)

    @staticmethod
    @abstractmethod
    def spell(config: QuantizationConfig) -> dict[str, Any]:
        """The block in the spelling of the library, but for W4A16, which has one for both."""

    @property
    def meaning(self) -> QuantizationConfig:
        if self._meaning is None:
            self._meaning = read_block(self.block)
        return self._meaning

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.block)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()
