"""The `quantization_config` of a component's config.json, as the libraries that load the component want it wrapped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Self

from omni_convert.formats.dialects import omni_convert, vllm_omni
from omni_convert.formats.quantization_config import QuantizationConfig
from omni_convert.loaders.modelopt_block import modelopt_algorithm, read_modelopt

__all__ = ["ConfigBlock", "QuantMethod", "is_modelopt_export", "read_block"]

CONFIG_FILE = "quantization_config"


class QuantMethod(StrEnum):
    """The name of our quantizers. Libraries demand an Enum member, not a string."""

    OMNI_CONVERT = omni_convert.QUANT_METHOD


def is_modelopt_export(block: Any) -> bool:
    """Whether a `modelopt` block describes an exported checkpoint (ours to read), not one of diffusers' own."""
    if not isinstance(block, Mapping) or block.get("quant_method") != "modelopt":
        return False
    return bool(modelopt_algorithm(block))


def read_block(block: Any, where: str = CONFIG_FILE) -> QuantizationConfig:
    """What a block means.

    Raises:
        CheckpointError: not an object, an unknown method or key.
    """
    if is_modelopt_export(block):
        return read_modelopt(block, where)
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
        return cls(cls.spell(config))

    @staticmethod
    def spell(config: QuantizationConfig) -> dict[str, Any]:
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
