"""Puts quantized layers into a model skeleton: exactly those that a checkpoint holds, or those that a request asks for.

What is quantized is read off the tensors in the file (their names, dtypes and shapes). The config block is then held
against it: a block that says otherwise is an error, never a reason to read the file differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from omni_convert.formats.config import MIXED, QuantizationConfig
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.dialects.vllm_omni import ignored_names
from omni_convert.formats.errors import CheckpointError, RecipeError, counted
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches, suggestion_for
from omni_convert.formats.families.table import find_family
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.fp8 import Fp8, Fp8Channel
from omni_convert.formats.fp8_storage import Fp8Storage
from omni_convert.formats.int4 import Int4
from omni_convert.formats.int8 import Int8
from omni_convert.formats.mxfp4 import Mxfp4
from omni_convert.formats.table import FORMATS, LOADABLE, FormatOptions, layer_formats
from omni_convert.loaders.layers.fp8_storage import (
    STORED_LAYERS,
    Fp8WeightStorage,
    install_stored,
    restore_weight,
    storage_layers,
    store_weight,
)
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.group_fit import GroupFits, PlannedLayer
from omni_convert.loaders.memory.allocator import release_free_memory
from omni_convert.loaders.memory.layout import disk_tensors
from omni_convert.loaders.memory.packed_int4 import as_loaded, packed_layers
from omni_convert.loaders.request.per_layer import requested_configs

__all__ = [
    "declared_format",
    "homeless_names",
    "install_empty_layers",
    "install_quantized",
    "refuse_homeless",
    "restore_linears",
    "select_layers",
    "settle_compute_dtypes",
    "to_disk_state",
]

NAMES_SHOWN = 3
RELEASING_BYTES = 1 << 20
PLAIN_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def declared_format(config: QuantizationConfig) -> QuantizingFormat:
    """The format that a config block promises.

    Raises:
        RecipeError: the method is not one of ours.
    """
    if config.method not in LOADABLE:
        raise RecipeError(f"quantization: found method '{config.method}', expected one of {', '.join(LOADABLE)}")
    return as_loaded(
        FORMATS[config.method].build(
            FormatOptions(
                static=config.is_static,
                smooth=config.require_smooth_scale,
                weight_block_size=config.weight_block_size,
                per_channel=config.per_channel,
                group_size=config.group_size,
            )
        )
    )


def install_empty_layers(
    model: nn.Module, specs: Mapping[str, TensorSpec], config: QuantizationConfig, where: str
) -> set[str]:
    """Replaces every linear that the checkpoint holds quantized by a `QuantizedLinear` whose tensors are still on meta.

    Args:
        model: on the meta device
        specs: tensors of the checkpoint, under the model's names
        config: meaning of the checkpoint's config block
        where: the checkpoint, for messages

    Returns:
        names of the tensors of these layers, without their biases

    Raises:
        CheckpointError: the block contradicts the tensors, a layer is incomplete, or the model has no such layer.
    """
    found = packed_layers(specs) if config.method == Int4.method else layer_formats(specs, config.method)
    if not found:
        raise CheckpointError(f"{where}: config says {config.method}, found no quantized layer, expected some")
    installed: dict[str, tuple[str, ...]] = {}
    for stem, fmt in found.items():
        if stem in config.ignored_layers:
            raise CheckpointError(f"{where}: {stem} is in ignored_layers, found {fmt.method} tensors for it")
        said = config.of_layer(stem)
        if said is None:
            raise CheckpointError(
                f"{where}: {stem} holds {fmt.label}, found no such layer in quantized_layers, expected it"
            )
        declared = declared_format(said)
        if type(fmt) is not type(declared) and not _is_one_row(fmt, declared, stem, specs):
            raise CheckpointError(f"{where}: {stem} holds {fmt.label}, expected {declared.label} as its config says")
        installed[stem] = _install_empty(model, stem, specs, _with_optional_tensors(declared, fmt), where)
    _refuse_bare_codes(model, specs, where)
    return {f"{stem}.{suffix}" for stem, suffixes in installed.items() for suffix in suffixes}


def _is_one_row(found: Format, declared: Format, stem: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether the layer is a row of FP8, whose one scale is that of the weight and of the row."""
    return isinstance(found, Fp8) and isinstance(declared, Fp8Channel) and specs[f"{stem}.weight"].shape[0] == 1


def _with_optional_tensors(declared: QuantizingFormat, found: Format) -> QuantizingFormat:
    """mul_scale of mxfp4 is optional, layer by layer, unless the block demands it."""
    if isinstance(declared, Mxfp4) and isinstance(found, Mxfp4):
        return replace(declared, smooth=declared.smooth or found.smooth)
    return declared


def _install_empty(
    model: nn.Module, stem: str, specs: Mapping[str, TensorSpec], fmt: QuantizingFormat, where: str
) -> tuple[str, ...]:
    linear = _find_module(model, stem)
    is_stored = isinstance(fmt, Fp8Storage)
    if not isinstance(linear, STORED_LAYERS if is_stored else nn.Linear):
        found = "nothing" if linear is None else type(linear).__name__
        raise CheckpointError(f"{where}: {stem} is quantized, found {found} of that name in {type(model).__name__}")
    tensors: dict[str, Tensor] = {}
    assert isinstance(linear, STORED_LAYERS)
    if is_stored:
        fmt = Fp8Storage.of(tuple(linear.weight.shape))
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
    if is_stored:
        install_stored(linear, tensors)
    else:
        model.set_submodule(stem, QuantizedLinear(fmt, tensors, linear.bias, in_features=columns))
    return tuple(tensors)


def _refuse_bare_codes(model: nn.Module, specs: Mapping[str, TensorSpec], where: str) -> None:
    """A layer whose scale is missing does not look quantized; its codes must not pass for weights."""
    homes = model.state_dict()
    for name, spec in specs.items():
        if name in homes and homes[name].dtype in PLAIN_FLOATS and spec.dtype not in PLAIN_FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {DTYPE_NAMES[spec.dtype]} without its scale, expected a quantized layer's tensors "
                "or plain floats; convert the model again"
            )


def _find_module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def homeless_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """Names in a checkpoint that the model has no tensor for, except those that its class says to drop."""
    homes = model.state_dict().keys()
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [name for name in names if name not in homes and not any(re.search(pattern, name) for pattern in patterns)]


def refuse_homeless(model: nn.Module, names: Collection[str], where: str) -> None:
    """Loading would drop such tensors silently, and a dropped scale is a wrong picture.

    Raises:
        CheckpointError: some name has no home in the model.
    """
    homeless = homeless_names(model, names)
    if homeless:
        shown = ", ".join(homeless[:NAMES_SHOWN]) + (", ..." if len(homeless) > NAMES_SHOWN else "")
        raise CheckpointError(
            f"{where}: found {counted(len(homeless), 'tensor')} without a home in {type(model).__name__} ({shown}), "
            "expected none; the checkpoint belongs to another model or version"
        )


def select_layers(model: nn.Module, config: QuantizationConfig) -> tuple[dict[str, PlannedLayer], QuantizationConfig]:
    """Which layers of an unquantized model a request means.

    The layers are those that the family's rule for this loader gives, without those that a pattern in `ignored_layers`
    matches and those whose shape the format cannot hold.

    Returns:
        layer name to what it becomes; and the request with `ignored_layers` spelled out, as a config block lists them

    Raises:
        RecipeError: static activations, an unknown method, or a pattern that matches nothing.
    """
    if config.method == Fp8Storage.method:
        return _select_stored(model, config)
    specs = {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    groups = find_family(type(model).__name__).layer_groups(specs, "diffusers")
    ignored = _ignored_groups(config.ignored_layers, groups, specs)
    asked_for = requested_configs(config, groups)
    layers: dict[str, PlannedLayer] = {}
    chosen: list[tuple[str, QuantizationConfig]] = []
    for group, said in zip(groups, asked_for, strict=True):
        fmt = None if said is None or group in ignored else _quantizing_format(said)
        if said is None or fmt is None or _must_stay(fmt, group, specs):
            ignored += [group] if group not in ignored else []
            continue
        layers |= {stem: PlannedLayer(_shared(fmt, group), group) for stem in group.members}
        chosen += [(name, said) for name in group.names]
    if not layers:
        raise RecipeError(_nothing_selected(model, config, groups, asked_for, specs))
    spelled = replace(config, ignored_layers=tuple(ignored_names(ignored)))
    return layers, replace(spelled, layers=tuple(chosen)) if config.method == MIXED else spelled


def _nothing_selected(
    model: nn.Module,
    config: QuantizationConfig,
    groups: Collection[LayerGroup],
    asked_for: Collection[QuantizationConfig | None],
    specs: Mapping[str, TensorSpec],
) -> str:
    """Why, of the first layer whose shape does not fit, if there is one."""
    shapes = (
        declared_format(said).unsupported(rows, columns)
        for group, said in zip(groups, asked_for, strict=True)
        if said is not None and group.keep_reason is None
        for rows, columns in (specs[f"{stem}.weight"].shape for stem in group.members)
    )
    reason = next(filter(None, shapes), None)
    where = f"quantization: found no layer of {type(model).__name__} to quantize to {config.method}"
    return where + (f" ({reason})" if reason else "") + ", expected some"


def _quantizing_format(config: QuantizationConfig) -> QuantizingFormat:
    """The format to quantize to while loading."""
    if config.is_static:
        raise RecipeError(
            f"quantization: static activations need calibration, found them of {config.method}; convert the model, or "
            "use 'dynamic', which is FP8_PER_CHANNEL_PER_TOKEN in ModelOpt's words"
        )
    return declared_format(config)


def _shared(fmt: QuantizingFormat, group: LayerGroup) -> QuantizingFormat:
    """INT8 shares scales in a fused group where it is told to, as conversions do."""
    return replace(fmt, shared_in_group=group.is_fused) if isinstance(fmt, Int8) else fmt


def _select_stored(model: nn.Module, config: QuantizationConfig) -> tuple[dict[str, PlannedLayer], QuantizationConfig]:
    """Every layer that can be stored, each for itself."""
    layers = {
        name: PlannedLayer(
            Fp8Storage.of(tuple(layer.get_parameter("weight").shape)), LayerGroup(name, (name,), is_fused=False)
        )
        for name, layer in storage_layers(model).items()
    }
    specs = {f"{name}.weight": TensorSpec(name, torch.bfloat16, ()) for name in layers}
    groups = [planned.group for planned in layers.values()]
    ignored = [group.runtime_name for group in _ignored_groups(config.ignored_layers, groups, specs)]
    chosen = {name: planned for name, planned in layers.items() if name not in ignored}
    if not chosen:
        raise RecipeError(f"quantization: found no layer of {type(model).__name__} to store as fp8, expected some")
    return chosen, replace(config, ignored_layers=tuple(sorted(ignored)))


def _ignored_groups(
    patterns: Collection[str], groups: Collection[LayerGroup], specs: Mapping[str, TensorSpec]
) -> list[LayerGroup]:
    stems = {name.removesuffix(".weight") for name in specs}
    ignored: list[LayerGroup] = []
    for pattern in patterns:
        matched = [g for g in groups if any(matches(pattern, name) for name in (g.runtime_name, *g.members))]
        if not matched and not any(matches(pattern, stem) for stem in stems):
            named = {name for group in groups for name in (group.runtime_name, *group.members)}
            raise RecipeError(
                f"ignored_layers: '{pattern}' matches no layer of the model{suggestion_for(pattern, named)}"
            )
        ignored += [group for group in matched if group not in ignored]
    return ignored


def _must_stay(fmt: QuantizingFormat, group: LayerGroup, specs: Mapping[str, TensorSpec]) -> bool:
    if group.keep_reason is not None:
        return True
    shapes = [specs[f"{stem}.weight"].shape for stem in group.members]
    return any(fmt.unsupported(rows, columns) is not None for rows, columns in shapes)


def install_quantized(
    model: nn.Module, stem: str, weight: Tensor, planned: PlannedLayer, where: str, fits: GroupFits | None = None
) -> QuantizedLinear | Fp8WeightStorage:
    """Replaces one linear by a `QuantizedLinear` made from its weight [out, in], on the weight's device.

    A layer that is only stored so becomes an `Fp8WeightStorage`.

    Raises:
        CheckpointError: the weight holds NaN or Inf.
    """
    linear = model.get_submodule(stem)
    fmt = planned.format
    if isinstance(fmt, Fp8Storage):
        stored = store_weight(linear, weight, f"{where}: {stem}.weight")
        _release_scratch(weight)
        return stored
    assert isinstance(linear, nn.Linear), "only linears are selected"
    if not all(math.isfinite(bound) for bound in torch.aminmax(weight)):  # NaN comes through, and nothing is copied
        raise CheckpointError(f"{where}: {stem}.weight holds NaN or Inf, expected finite weights")
    tensors = (fits or GroupFits()).quantize(stem, weight, planned)
    layer = QuantizedLinear(fmt, tensors, linear.bias, in_features=linear.in_features)
    model.set_submodule(stem, layer)
    _release_scratch(weight)
    return layer


def _release_scratch(weight: Tensor) -> None:
    """After a layer that was large enough to be worth it."""
    if weight.device.type == "cpu" and weight.nbytes >= RELEASING_BYTES:
        release_free_memory()


def to_disk_state(state_dict: Mapping[str, Tensor], layers: Mapping[str, tuple[Format, int]]) -> dict[str, Tensor]:
    """A model's state as files hold it.

    Args:
        state_dict: of a model, as it lies in memory
        layers: name of each quantized layer to its format and in_features
    """
    unpacked = {}
    for stem, (fmt, in_features) in layers.items():
        name = f"{stem}.weight"
        if name in state_dict:
            unpacked[name] = disk_tensors(fmt, {"weight": state_dict[name]}, in_features)["weight"]
    return {**state_dict, **unpacked}


def settle_compute_dtypes(model: nn.Module) -> None:
    """Has stored layers compute in the dtype that the rest of the model was loaded in."""
    plain = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, Fp8WeightStorage):
            layer.compute_dtype = plain if layer.bias is None else layer.bias.dtype  # type: ignore[assignment]  # a parameter, if any


def restore_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every quantized layer by the one that it stands for."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Fp8WeightStorage):
            restore_weight(layer, dtype)
        if isinstance(layer, QuantizedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)
