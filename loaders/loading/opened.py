"""Layers in the spelling of another tool, whose tensors a model cannot hold under the names that they have in files.

Such layers are read through their dialect before anything else is loaded, and hold the canonical tensors of their
format. Saving spells them as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.formats.checks.meaning import refuse_doubts
from omni_convert.formats.dialects.base import Dialect, WrittenSpelling
from omni_convert.formats.dialects.found import Found
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.views.opened import QuantizedLayer, read_layers
from omni_convert.loaders.kernels.kernel import Activations
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.pipeline_files import open_weights

__all__ = ["OpenedLayers", "install_opened", "spelled_state"]


@dataclass(frozen=True)
class OpenedLayers:
    """The quantized layers of a component's files.

    Attributes:
        files: the component's, or all its shards
        block: its config block
    """

    files: Sequence[str]
    block: Mapping[str, Any]

    def names(self) -> tuple[set[str], set[str]]:
        """Names of the layers' tensors in the files, and in the model that holds them.

        Raises:
            CheckpointError: a layer is damaged, or its meaning is not certain.
        """
        with open_weights(self.files) as checkpoint:
            dialect, layers = self._read(checkpoint)
            in_files = {name for layer in layers.values() for name in layer.sources}
            in_model = {f"{stem}.{suffix}" for stem, layer in layers.items() for suffix in layer.tensors}
            biases = {f"{stem}.bias" for stem in layers if f"{stem}.bias" in checkpoint}
            return in_files, in_model | (biases if dialect.bias_codec is not None else set())

    def install(self, model: nn.Module, device_map: Any) -> Dialect:
        """Replaces linears of a model by the layers of the files.

        Args:
            model: on the meta device
            device_map: module name to device, for all below it; None for the CPU

        Returns:
            the dialect that the files are in

        Raises:
            CheckpointError: the model has no such layer, or values are impossible.
        """
        with open_weights(self.files) as checkpoint:
            dialect, layers = self._read(checkpoint)
            for stem, layer in layers.items():
                device = _device_of(stem, device_map)
                installed = install_opened(model, layer, device)
                if dialect.bias_codec is not None and installed.bias is not None:
                    stored = checkpoint.read(f"{stem}.bias")
                    layout = TensorLayout(stored.dtype, layer.shape[:1], 0)
                    bias = dialect.bias_codec.decode(stored, layout).to(device)
                    installed.bias = nn.Parameter(bias, requires_grad=False)
        return dialect

    def _read(self, checkpoint: Any) -> tuple[Dialect, dict[str, QuantizedLayer]]:
        reading = read_layers(Found(checkpoint, self.block, checkpoint.metadata))
        refuse_doubts(reading)
        assert reading.dialect is not None, "the block names one"
        return reading.dialect, reading.layers


def install_opened(model: nn.Module, layer: QuantizedLayer, device: torch.device | None = None) -> QuantizedLinear:
    """Replaces a linear of a model by a layer of a file; its bias stays.

    Args:
        model: on the meta device
        device: where to put the layer's tensors; None for the CPU

    Raises:
        CheckpointError: the model has no such layer, or values are impossible.
    """
    stem, path = layer.stem, layer.checkpoint.path
    linear = _linear(model, stem, layer)
    tensors = layer.read(0, layer.shape[0])
    flaw = layer.format.flaw(tensors)
    if flaw is not None:
        raise CheckpointError(f"{path}: {stem}.{flaw}; download it or convert it again")
    tensors = {suffix: tensor.to(device or "cpu") for suffix, tensor in tensors.items()}
    activations: Activations = "bf16" if layer.stored.is_full_precision else "quantized"
    installed = QuantizedLinear(layer.format, tensors, linear.bias, activations, layer.shape[1])
    model.set_submodule(stem, installed)
    return installed


def _linear(model: nn.Module, stem: str, layer: QuantizedLayer) -> nn.Linear:
    try:
        linear = model.get_submodule(stem)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != layer.shape:
        found = "nothing" if linear is None else repr(linear)
        rows, columns = layer.shape
        raise CheckpointError(
            f"{layer.checkpoint.path}: {stem}: found {found} in {type(model).__name__}, expected a linear of "
            f"{rows} x {columns}, which the file holds quantized; download it or convert it again"
        )
    return linear


def _device_of(stem: str, device_map: Any) -> torch.device:
    """The device of the innermost module in the map that holds a layer."""
    name, places = stem, dict(device_map or {})
    while name and name not in places:
        name = name.rpartition(".")[0]
    return torch.device(places.get(name, "cpu"))


def spelled_state(
    state_dict: Mapping[str, Tensor], layers: Mapping[str, tuple[Format, int]], dialect: Dialect
) -> dict[str, Tensor]:
    """A model's state as the files of a dialect hold it.

    Args:
        state_dict: that of the model, with canonical tensors
        layers: name of each quantized layer to its format and in_features
    """
    state = dict(state_dict)
    for stem, (fmt, in_features) in layers.items():
        rows = len(state[f"{stem}.weight"])
        spelling = dialect.spelling(fmt, (rows, in_features))
        assert isinstance(spelling, WrittenSpelling), "it was read in this dialect"
        tensors = {suffix: state.pop(f"{stem}.{suffix}") for suffix in fmt.layout(rows, in_features)}
        state |= {f"{stem}.{name}": tensor for name, tensor in spelling.encode(tensors).items()}
        if dialect.bias_codec is not None and f"{stem}.bias" in state:
            state[f"{stem}.bias"] = dialect.bias_codec.encode(state[f"{stem}.bias"])
    return state
