"""Layers in the spelling of another tool, whose tensors a model cannot hold under the names that they have in files.

Such layers are read through their dialect before anything else is loaded, and hold the canonical tensors of their
format. Saving spells them as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_convert.formats.checks.meaning import refuse_doubts
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.base import Dialect, WrittenSpelling
from omni_convert.formats.dialects.found import Found
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.views.opened import QuantizedLayer, read_layers
from omni_convert.loaders.kernels.kernel import Activations
from omni_convert.loaders.layers.column_parts import ColumnParts
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
            in_model: set[str] = set()
            for stem, layer in layers.items():
                has_bias = f"{stem}.bias" in checkpoint and _holds_bias(dialect, layer)
                suffixes = [*layer.tensors, *(["bias"] if has_bias else [])]
                in_model |= {f"{place}.{suffix}" for place in _places(dialect, stem) for suffix in suffixes}
                in_files |= {f"{stem}.bias"} if has_bias else set()
            renamed = _renamed(checkpoint, dialect, in_files)
            return in_files | renamed.keys(), in_model.union(*renamed.values())

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
            for layer in layers.values():
                self._install_layer(model, dialect, checkpoint, layer, device_map)
            of_layers = {name for layer in layers.values() for name in (*layer.sources, f"{layer.stem}.bias")}
            for stored, names in _renamed(checkpoint, dialect, of_layers).items():
                _install_tensors(model, names, checkpoint.read(stored), device_map)
        return dialect

    def _install_layer(
        self, model: nn.Module, dialect: Dialect, checkpoint: Checkpoint, layer: QuantizedLayer, device_map: Any
    ) -> None:
        """Puts a layer, or each of the model's layers that it joins, in their places."""
        parts, held = _places(dialect, layer.stem), dialect.part_of(layer.stem)
        if held is not None:
            _hold_columns(model, held[0], layer)
        linears = [_linear(model, part, layer) for part in parts]
        if sum(linear.out_features for linear in linears) != layer.shape[0]:
            raise _other_shape(model, layer, linears[0])
        bias, start = _read_bias(checkpoint, dialect, layer), 0
        for part, linear in zip(parts, linears, strict=True):
            rows, device = (start, start + linear.out_features), _device_of(part, device_map)
            installed = install_opened(model, layer, device, part, rows)
            if bias is not None and installed.bias is not None:
                installed.bias = nn.Parameter(bias[slice(*rows)].to(device), requires_grad=False)
            start = rows[1]

    def _read(self, checkpoint: Any) -> tuple[Dialect, dict[str, QuantizedLayer]]:
        reading = read_layers(Found(checkpoint, self.block, checkpoint.metadata))
        refuse_doubts(reading)
        assert reading.dialect is not None, "the block names one"
        return reading.dialect, reading.layers


def install_opened(
    model: nn.Module,
    layer: QuantizedLayer,
    device: torch.device | None = None,
    part: str | None = None,
    rows: tuple[int, int] | None = None,
) -> QuantizedLinear:
    """Replaces a linear of a model by a layer of a file; its bias stays.

    Args:
        model: on the meta device
        device: where to put the layer's tensors; None for the CPU
        part: name of the linear, where the layer of the file joins several
        rows: the first of its rows there, and the one after the last

    Raises:
        CheckpointError: the model has no such layer, or values are impossible.
    """
    start, stop = rows or (0, layer.shape[0])
    linear = _linear(model, part or layer.stem, layer)
    if linear.out_features != stop - start:
        raise _other_shape(model, layer, linear)
    tensors = layer.read(start, stop)
    flaw = layer.format.flaw(tensors)
    if flaw is not None:
        raise CheckpointError(f"{layer.checkpoint.path}: {layer.stem}.{flaw}; download it or convert it again")
    tensors = {suffix: tensor.to(device or "cpu") for suffix, tensor in tensors.items()}
    activations: Activations = "bf16" if layer.stored.is_full_precision else "quantized"
    installed = QuantizedLinear(layer.format, tensors, linear.bias, activations, layer.shape[1])
    model.set_submodule(part or layer.stem, installed)
    return installed


def _holds_bias(dialect: Dialect, layer: QuantizedLayer) -> bool:
    """Whether a bias is laid out otherwise than in the model, so that it is read with its layer."""
    return layer.stored.spelling.bias is not None or dialect.model_stems(layer.stem) != (layer.stem,)


def _read_bias(checkpoint: Checkpoint, dialect: Dialect, layer: QuantizedLayer) -> Tensor | None:
    """The bias of a layer in its natural order [out]; None if the model reads it by itself, or there is none."""
    name = f"{layer.stem}.bias"
    if name not in checkpoint or not _holds_bias(dialect, layer):
        return None
    stored, spelling = checkpoint.read(name), layer.stored.spelling
    codec = spelling.bias
    bias = stored if codec is None else codec.decode(stored, TensorLayout(stored.dtype, layer.shape[:1], 0))
    added = layer.format.shift_product(layer.read(0, layer.shape[0])) if spelling.lacks_shift else None
    return bias if added is None else (bias.float() + added).to(bias.dtype)


def _places(dialect: Dialect, stem: str) -> tuple[str, ...]:
    """Names in the model of the layers of which a stored layer consists."""
    held = dialect.part_of(stem)
    return dialect.model_stems(stem) if held is None else (f"{held[0]}.parts.{held[1]}",)


def _renamed(checkpoint: Checkpoint, dialect: Dialect, of_layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Name in the file → names in the model of each tensor that is not quantized and has other names there.

    Args:
        of_layers: names in the file of the tensors of quantized layers
    """
    names: dict[str, tuple[str, ...]] = {}
    for name in checkpoint.keys() - of_layers:
        stem, _, leaf = name.rpartition(".")
        places = dialect.model_stems(stem)
        if places != (stem,):
            names[name] = tuple(f"{place}.{leaf}" for place in places)
    return names


def _install_tensors(model: nn.Module, names: Sequence[str], tensor: Tensor, device_map: Any) -> None:
    """Sets parameters of the model to the rows of a tensor, one after the other, in the dtypes that they have there.

    Raises:
        CheckpointError: the model has no such parameters, or some of other shapes.
    """
    places = [_parameter(model, name) for name in names]
    counts = [place.shape[0] if place is not None and place.dim() else 0 for place in places]
    is_split = len(places) > 1 and tensor.dim() > 0 and sum(counts) == len(tensor)
    parts = torch.split(tensor, counts) if is_split else [tensor] * len(places)
    for name, place, rows in zip(names, places, parts, strict=True):
        if place is None or place.shape != rows.shape:
            found = "nothing" if place is None else str(list(place.shape))
            raise CheckpointError(
                f"{name}: found {found} in {type(model).__name__}, expected {list(rows.shape)}, which the file holds; "
                "download it or convert it again"
            )
        stem, _, leaf = name.rpartition(".")
        installed = nn.Parameter(rows.to(_device_of(name, device_map), place.dtype), requires_grad=False)
        setattr(model.get_submodule(stem), leaf, installed)


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _hold_columns(model: nn.Module, stem: str, layer: QuantizedLayer) -> None:
    """Replaces a linear by two: one with as many columns as it has rows, one with the rest.

    Raises:
        CheckpointError: the model has no linear of this name, or one that is not wider than high.
    """
    try:
        linear = model.get_submodule(stem)
    except AttributeError:
        linear = None
    if isinstance(linear, ColumnParts):
        return
    if not isinstance(linear, nn.Linear) or linear.in_features <= linear.out_features:
        raise _other_shape(model, layer, linear)
    widths = (linear.out_features, linear.in_features - linear.out_features)
    model.set_submodule(stem, ColumnParts(widths, linear.out_features, bias=linear.bias is not None))


def _linear(model: nn.Module, stem: str, layer: QuantizedLayer) -> nn.Linear:
    try:
        linear = model.get_submodule(stem)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or linear.in_features != layer.shape[1]:
        raise _other_shape(model, layer, linear)
    return linear


def _other_shape(model: nn.Module, layer: QuantizedLayer, linear: nn.Module | None) -> CheckpointError:
    found, (rows, columns) = "nothing" if linear is None else repr(linear), layer.shape
    return CheckpointError(
        f"{layer.checkpoint.path}: {layer.stem}: found {found} in {type(model).__name__}, expected a linear of "
        f"{rows} x {columns}, which the file holds quantized; download it or convert it again"
    )


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

    Raises:
        RecipeError: the files of the dialect need more than tensors.
    """
    if dialect.renames_tensors:
        raise RecipeError(
            f"save_pretrained: found a model in the dialect {dialect.name}, whose files have names of their own, "
            "expected one in another dialect; copy the file, or use -m keep --dialect nunchaku-lite first"
        )
    state = dict(state_dict)
    for stem, (fmt, in_features) in layers.items():
        rows = len(state[f"{stem}.weight"])
        spelling = dialect.spelling(fmt, (rows, in_features))
        assert isinstance(spelling, WrittenSpelling), "it was read in this dialect"
        tensors = {suffix: state.pop(f"{stem}.{suffix}") for suffix in fmt.layout(rows, in_features)}
        state |= {f"{stem}.{name}": tensor for name, tensor in spelling.encode(tensors).items()}
        if spelling.bias is not None and f"{stem}.bias" in state:
            state[f"{stem}.bias"] = spelling.bias.encode(state[f"{stem}.bias"])
    return state
