"""Puts quantized layers in the place of a model's linears, and takes them out again."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.errors import CheckpointError, counted
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.loaders.layers.fp8_storage import (
    STORED_LAYERS,
    Fp8WeightStorage,
    install_stored,
    restore_weight,
    store_weight,
)
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.group_fit import GroupFits
from omni_convert.loaders.loading.select import PlannedLayer
from omni_convert.loaders.memory.allocator import release_free_memory
from omni_convert.loaders.memory.layout import disk_tensors

__all__ = [
    "install_empty_layers",
    "install_quantized",
    "quantized_layers",
    "refuse_unexpected",
    "restore_linears",
    "settle_compute_dtypes",
    "to_disk_state",
]

NAMES_SHOWN = 3
RELEASING_BYTES = 1 << 20
PLAIN_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def install_empty_layers(
    model: nn.Module, specs: Mapping[str, TensorSpec], formats: Mapping[str, QuantizingFormat], where: str
) -> set[str]:
    """Replaces linears by quantized layers whose tensors are on the meta device until they are loaded.

    Args:
        model: on the meta device
        specs: tensors of the checkpoint, under the model's names
        formats: name of each layer to its format
        where: the checkpoint, for messages

    Returns:
        names of the tensors of these layers, without their biases

    Raises:
        CheckpointError: a layer is incomplete, the model has no such layer, or codes lack their scale.
    """
    installed = {stem: _install_empty(model, stem, specs, fmt, where) for stem, fmt in formats.items()}
    _refuse_bare_codes(model, specs, where)
    return {f"{stem}.{suffix}" for stem, suffixes in installed.items() for suffix in suffixes}


def _install_empty(
    model: nn.Module, stem: str, specs: Mapping[str, TensorSpec], fmt: QuantizingFormat, where: str
) -> tuple[str, ...]:
    linear = _find_module(model, stem)
    if not isinstance(linear, STORED_LAYERS if fmt.is_storage else nn.Linear):
        found = "nothing" if linear is None else type(linear).__name__
        raise CheckpointError(
            f"{where}: {stem} is quantized, found {found} of that name in {type(model).__name__}, expected a layer "
            "with a weight; download it or convert it again"
        )
    tensors: dict[str, Tensor] = {}
    assert isinstance(linear, STORED_LAYERS)
    fmt = fmt.for_weight(tuple(linear.weight.shape))
    rows, columns = len(linear.weight), math.prod(linear.weight.shape[1:])
    for suffix, layout in fmt.layout(rows, columns).items():
        name = f"{stem}.{suffix}"
        if name not in specs:
            raise CheckpointError(f"{where}: {name} is missing, {fmt.label} needs it; convert the model again")
        spec = specs[name]
        is_scalar = layout.shape == () and spec.shape == (1,)  # runtimes read [] and [1] alike
        if spec.dtype is not layout.dtype or (spec.shape != layout.shape and not is_scalar):
            found = f"{DTYPE_NAMES[spec.dtype]} {list(spec.shape)}"
            raise CheckpointError(
                f"{where}: {name} is {found}, expected {DTYPE_NAMES[layout.dtype]} {list(layout.shape)} for {fmt.label}"
            )
        tensors[suffix] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    if fmt.is_storage:
        install_stored(linear, tensors)
    else:
        model.set_submodule(stem, QuantizedLinear(fmt, tensors, linear.bias, in_features=columns))
    return tuple(tensors)


def _refuse_bare_codes(model: nn.Module, specs: Mapping[str, TensorSpec], where: str) -> None:
    """Refuses codes without a scale: such a layer does not look quantized, and its codes would be used as weights."""
    own = model.state_dict()
    for name, spec in specs.items():
        if name in own and own[name].dtype in PLAIN_FLOATS and spec.dtype not in PLAIN_FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {DTYPE_NAMES[spec.dtype]} without its scale, expected a quantized layer's tensors "
                "or plain floats; convert the model again"
            )


def _find_module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def refuse_unexpected(model: nn.Module, names: Collection[str], where: str) -> None:
    """Refuses tensors that loading would drop silently, since a dropped scale is a wrong picture.

    Names that the model's class says to ignore pass.

    Raises:
        CheckpointError: the model has no tensor of some name.
    """
    expected = model.state_dict().keys()
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [
        name for name in names if name not in expected and not any(re.search(pattern, name) for pattern in patterns)
    ]
    if unexpected:
        shown = ", ".join(unexpected[:NAMES_SHOWN]) + (", ..." if len(unexpected) > NAMES_SHOWN else "")
        raise CheckpointError(
            f"{where}: found {counted(len(unexpected), 'tensor')} that {type(model).__name__} does not have ({shown}), "
            "expected none; the checkpoint belongs to another model or version"
        )


def install_quantized(
    model: nn.Module, stem: str, weight: Tensor, planned: PlannedLayer, where: str, fits: GroupFits | None = None
) -> QuantizedLinear | Fp8WeightStorage:
    """Replaces one linear by a `QuantizedLinear` made from its weight [out, in], on the weight's device.

    A layer that is only stored in FP8 becomes an `Fp8WeightStorage`.

    Raises:
        CheckpointError: the weight holds NaN or Inf.
    """
    linear = model.get_submodule(stem)
    fmt = planned.format
    if fmt.is_storage:
        stored = store_weight(linear, weight, f"{where}: {stem}.weight")
        _release_scratch(weight)
        return stored
    assert isinstance(linear, nn.Linear), "only linears are selected"
    if not all(
        math.isfinite(bound) for bound in torch.aminmax(weight)
    ):  # NaN shows in both bounds, and nothing is copied
        raise CheckpointError(f"{where}: {stem}.weight holds NaN or Inf, expected finite weights")
    tensors = (fits or GroupFits()).quantize(stem, weight, planned)
    layer = QuantizedLinear(fmt, tensors, linear.bias, in_features=linear.in_features)
    model.set_submodule(stem, layer)
    _release_scratch(weight)
    return layer


def _release_scratch(weight: Tensor) -> None:
    """Gives memory back after a layer that was large enough to be worth it."""
    if weight.device.type == "cpu" and weight.nbytes >= RELEASING_BYTES:
        release_free_memory()


def quantized_layers(model: nn.Module) -> dict[str, tuple[Format, int]]:
    """Name of each quantized layer to its format and in_features."""
    return {
        name: (layer.format, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def to_disk_state(state_dict: Mapping[str, Tensor], layers: Mapping[str, tuple[Format, int]]) -> dict[str, Tensor]:
    """A model's state as files hold it.

    Args:
        state_dict: that of the model, as it lies in memory
        layers: its `quantized_layers`
    """
    unpacked = {}
    for stem, (fmt, in_features) in layers.items():
        name = f"{stem}.weight"
        if name in state_dict:
            unpacked[name] = disk_tensors(fmt, {"weight": state_dict[name]}, in_features)["weight"]
    return {**state_dict, **unpacked}


def settle_compute_dtypes(model: nn.Module) -> None:
    """Makes stored layers compute in the dtype in which the rest of the model was loaded."""
    plain = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, Fp8WeightStorage):
            layer.compute_dtype = plain if layer.bias is None else layer.bias.dtype  # type: ignore[assignment]  # a parameter, if any


def restore_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every quantized layer by a plain one with its dequantized weight."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Fp8WeightStorage):
            restore_weight(layer, dtype)
        if isinstance(layer, QuantizedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)
