"""The parts that our quantizers for diffusers and transformers share: their config block and the steps of loading."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from torch import nn

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects import auto_round, omni_convert
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.config_block import read_block
from omni_convert.formats.schemes.int4 import DEFAULT_GROUP, Int4
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.formats.table import is_named_by_dialect
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.group_fit import GroupFits
from omni_convert.loaders.loading.install import install_empty_layers, refuse_unexpected, settle_compute_dtypes
from omni_convert.loaders.loading.opened import OpenedLayers
from omni_convert.loaders.loading.pipeline_files import open_weights
from omni_convert.loaders.loading.select import PlannedLayer, select_layers, stored_layers
from omni_convert.loaders.loading.values import check_stored_values
from omni_convert.loaders.request.spec import CalibratedConfig

__all__ = ["ConfigBlock", "LayerQuantizer"]


class QuantMethod(StrEnum):
    """The name of our quantizers. Libraries demand an Enum member, not a string."""

    OMNI_CONVERT = omni_convert.QUANT_METHOD


class ConfigBlock(ABC):
    """`quantization_config` as an object, for the config classes of the libraries; saved again exactly as it was read.

    It is mixed into their `QuantizationConfigMixin`, whose constructors accept each key as an argument and lose unknown
    ones.
    """

    quant_method = QuantMethod.OMNI_CONVERT

    def __init__(self, block: Mapping[str, Any], meaning: QuantizationConfig | None = None) -> None:
        """A block as it was read.

        Args:
            meaning: what it means, if that is known already
        """
        self.block = copy.deepcopy(dict(block))
        self._meaning = meaning

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, config: QuantizationConfig) -> Self:
        """The block that declares a configuration, in the spelling of the library."""
        return cls(cls._spelled(config, ()), config)

    def declare(self, config: QuantizationConfig, layers: Collection[str]) -> None:
        """Replaces the block by one that declares this configuration of these layers."""
        self.block = self._spelled(config, layers)
        self._meaning = None

    @classmethod
    def _spelled(cls, config: QuantizationConfig, layers: Collection[str]) -> dict[str, Any]:
        config = config.stored if isinstance(config, CalibratedConfig) else config
        if config.method != Int4.method:
            return cls.to_block(config)
        return auto_round.to_block(config.group_size or DEFAULT_GROUP, layers, config.ignored_layers)

    @staticmethod
    @abstractmethod
    def to_block(config: QuantizationConfig) -> dict[str, Any]:
        """The block in the spelling of the library. W4A16 has one spelling for both libraries and is not asked for."""

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


class LayerQuantizer:
    """Loads quantized layers as they are on disk; or, from an unquantized checkpoint, quantizes layer by layer.

    It is mixed into the quantizer classes of the libraries, which call its steps: `_prepare` before any weight is
    read, then `_process_model_after_weight_loading`.

    Attributes:
        meaning: what the config block declares
        where: the checkpoint, for messages
        loaded: tensors of quantized layers that are stored so
        planned: layers to quantize while loading
        fits: quantizes these
        dialect: that of layers that were read through it, and are saved so
    """

    quantization_config: ConfigBlock
    pre_quantized: bool
    fits: GroupFits | None = None
    dialect: Dialect | None = None
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: ConfigBlock, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg]  # that of the library's class
        self.meaning = quantization_config.meaning
        self.where = "checkpoint"
        self.loaded: set[str] = set()
        self.planned: dict[str, PlannedLayer] = {}
        self._opened = ExitStack()

    def _prepare(self, model: nn.Module, files: Sequence[str], device_map: Any = None) -> None:
        """Puts layers in place of those that the files hold quantized, or plans which ones to quantize.

        The layers are empty, but for those that are read through their dialect.
        """
        self.where = str(Path(files[0]).parent) if files else type(model).__name__
        if not self.pre_quantized:
            self._plan(model, files)
            return
        if is_named_by_dialect(self.meaning.method):
            self.dialect = OpenedLayers(files, self.quantization_config.block).install(model, device_map)
            return
        with open_weights(files) as checkpoint:
            stored = self._under_model_names(checkpoint, model)
            specs = {name: replace(spec, name=name) for name, spec in stored.items()}
            formats = stored_layers(specs, self.meaning, self.where)
            self.loaded = install_empty_layers(model, specs, formats, self.where)
            refuse_unexpected(model, self._required_names(specs), self.where)
            check_stored_values(checkpoint, {stored[name].name for name in self.loaded}, self.where)

    def _plan(self, model: nn.Module, files: Sequence[str]) -> None:
        statistics, component = None, ""
        if isinstance(self.meaning, CalibratedConfig):
            statistics, component = Statistics.load(self.meaning.input_scales), self.meaning.component
        self.planned, self.meaning = select_layers(model, self.meaning, statistics, component)
        self.quantization_config.declare(self.meaning, self.planned)
        self.fits = GroupFits()
        if files and all(Path(file).suffix == ".safetensors" for file in files):
            checkpoint = self._opened.enter_context(open_weights(files))
            stored = self._under_model_names(checkpoint, model)
            self.fits = GroupFits(checkpoint, {name: spec.name for name, spec in stored.items()})
            if statistics is not None:
                statistics.identity.check_model({component: checkpoint})

    def _under_model_names(self, specs: Mapping[str, TensorSpec], _model: nn.Module) -> Mapping[str, TensorSpec]:
        """The tensors of a checkpoint by their names in the model."""
        return specs

    def _required_names(self, names: Iterable[str]) -> list[str]:
        """Names of the tensors that the model must have, under the model's names."""
        return list(names)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self._opened.close()
        self.fits = None
        settle_compute_dtypes(model)
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.select_kernel()
        return model
