"""The `quantization_config` of a component's config.json, as the libraries that load the component want it wrapped."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from typing import Any, Self

from omni_convert.formats.dialects import auto_round, omni_convert, vllm_omni
from omni_convert.formats.int4 import DEFAULT_GROUP, Int4
from omni_convert.formats.quantization_config import QuantizationConfig
from omni_convert.loaders.auto_round_block import is_packed_int4, read_auto_round
from omni_convert.loaders.modelopt_block import modelopt_algorithm, read_modelopt

__all__ = ["ConfigBlock", "QuantMethod", "is_ours", "read_block"]

CONFIG_FILE = "quantization_config"


class QuantMethod(StrEnum):
    """The name of our quantizers. Libraries demand an Enum member, not a string."""

    OMNI_CONVERT = omni_convert.QUANT_METHOD


def is_modelopt_export(block: Any) -> bool:
    """Whether a `modelopt` block describes an exported checkpoint (ours to read), not one of diffusers' own."""
    if not isinstance(block, Mapping) or block.get("quant_method") != "modelopt":
        return False
    return bool(modelopt_algorithm(block))


def is_ours(block: Any) -> bool:
    """Whether we read a block under a name that the library has given to another quantizer."""
    return is_modelopt_export(block) or is_packed_int4(block)


def read_block(block: Any, where: str = CONFIG_FILE) -> QuantizationConfig:
    """What a block means.

    Raises:
        CheckpointError: not an object, an unknown method or key.
    """
    if is_modelopt_export(block):
        return read_modelopt(block, where)
    if is_packed_int4(block):
        return read_auto_round(block)
    if isinstance(block, Mapping) and block.get("quant_method") == omni_convert.QUANT_METHOD:
        return omni_convert.from_block(block, where)
    return vllm_omni.from_block(block, where)


class ConfigBlock:
    """A block as an object, for the config classes of diffusers and transformers; saved again exactly as it was read.

    Mixed into their `QuantizationConfigMixin`, whose constructors take each key as an argument and lose unknown ones.
    """

    quant_method = QuantMethod.OMNI_CONVERT

    def __init__(self, block: Mapping[str, Any]) -> None:
        self.block = copy.deepcopy(dict(block))

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

    @classmethod
    def _spelled(cls, config: QuantizationConfig, layers: Collection[str]) -> dict[str, Any]:
        if config.method != Int4.method:
            return cls.spell(config)
        return auto_round.to_block(config.group_size or DEFAULT_GROUP, layers, config.ignored_layers)

    @staticmethod
    def spell(config: QuantizationConfig) -> dict[str, Any]:
        """The block in the spelling of the library, but for W4A16, which has one for both."""
        raise NotImplementedError

    @property
    def meaning(self) -> QuantizationConfig:
        return read_block(self.block)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.block)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()
