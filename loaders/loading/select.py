"""Decides which layers of a model get which format: those that a checkpoint holds, or those that a request asks for.

In a quantized checkpoint the tensors decide, by their names, dtypes and shapes. A config block that contradicts them is
an error, never a reason to read the file differently. In an unquantized one the rule of the model's family decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from omni_convert.formats.config import MIXED, QuantizationConfig
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.vllm_omni import ignored_names
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches, suggestion_for
from omni_convert.formats.families.table import find_family
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.rows import InputStatistics
from omni_convert.formats.schemes.fp8 import FP8, FP8_PER_ROW
from omni_convert.formats.schemes.fp8_storage import Fp8Storage
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.formats.table import LOADABLE, build_format, layer_formats
from omni_convert.loaders.layers.fp8_storage import storage_layers
from omni_convert.loaders.memory.layout import as_loaded
from omni_convert.loaders.memory.packed_int4 import packed_layers
from omni_convert.loaders.request.per_layer import requested_configs

__all__ = ["PlannedLayer", "declared_format", "select_layers", "stored_layers"]


@dataclass(frozen=True)
class PlannedLayer:
    """The format of a layer to quantize while loading, the layers with which a runtime fuses it, and their inputs."""

    format: QuantizingFormat
    group: LayerGroup
    inputs: InputStatistics | None = None


def declared_format(config: QuantizationConfig, *, is_fused: bool = False) -> QuantizingFormat:
    """The format that a config block declares.

    Args:
        is_fused: the layer belongs to a fused group, in which INT8 shares scales as it does in conversions

    Raises:
        RecipeError: the method is not one of ours.
    """
    if config.method not in LOADABLE:
        raise RecipeError(f"quantization: found method '{config.method}', expected one of {', '.join(LOADABLE)}")
    return as_loaded(
        build_format(
            config.method,
            static=config.is_static,
            smooth=config.require_smooth_scale,
            weight_block_size=config.weight_block_size,
            per_channel=config.per_channel,
            group_size=config.group_size,
            shared_in_group=is_fused,
        )
    )


def stored_layers(
    specs: Mapping[str, TensorSpec], config: QuantizationConfig, where: str
) -> dict[str, QuantizingFormat]:
    """The format of every layer that a checkpoint holds quantized, by name.

    Args:
        specs: tensors of the checkpoint, under the model's names
        config: meaning of the checkpoint's config block
        where: the checkpoint, for messages

    Raises:
        CheckpointError: the block contradicts the tensors.
    """
    found = packed_layers(specs) if config.method == Int4.method else layer_formats(specs, config.method)
    if not found:
        raise CheckpointError(f"{where}: config says {config.method}, found no quantized layer, expected some")
    return {stem: _stored_format(stem, fmt, specs, config, where) for stem, fmt in found.items()}


def _stored_format(
    stem: str, found: Format, specs: Mapping[str, TensorSpec], config: QuantizationConfig, where: str
) -> QuantizingFormat:
    if stem in config.ignored_layers:
        raise CheckpointError(f"{where}: {stem} is in ignored_layers, found {found.method} tensors for it")
    layer_config = config.of_layer(stem)
    if layer_config is None:
        raise CheckpointError(
            f"{where}: {stem} holds {found.label}, found no such layer in quantized_layers, expected it"
        )
    declared = declared_format(layer_config)
    if type(found) is not type(declared) and not _is_one_row(found, declared, stem, specs):
        raise CheckpointError(f"{where}: {stem} holds {found.label}, expected {declared.label} as its config says")
    return _with_optional_tensors(declared, found)


def _is_one_row(found: Format, declared: Format, stem: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether an FP8 weight has one row, so that its one scale is both per weight and per row."""
    is_fp8 = found.encoding == FP8 and declared.encoding == FP8_PER_ROW
    return is_fp8 and specs[f"{stem}.weight"].shape[0] == 1


def _with_optional_tensors(declared: QuantizingFormat, found: Format) -> QuantizingFormat:
    """Adds the `mul_scale` of a layer that has one: it is optional unless the block demands it."""
    return declared.with_mul_scale() or declared if found.is_smoothed else declared


def select_layers(
    model: nn.Module, config: QuantizationConfig, statistics: Statistics | None = None, component: str = "transformer"
) -> tuple[dict[str, PlannedLayer], QuantizationConfig]:
    """Chooses the layers of an unquantized model that a request quantizes.

    The family's rule for this loader gives the layers. Excluded are layers that a pattern in `ignored_layers` matches,
    and layers whose shape the format cannot hold.

    Args:
        statistics: inputs of the layers, for static activations
        component: the name under which the statistics have them

    Returns:
        the plan by layer name; and the request with every ignored layer listed, as a config block needs it

    Raises:
        RecipeError: activations are static without statistics, the method is unknown, or a pattern matches nothing.
        CalibrationError: the statistics do not cover a layer.
    """
    if config.method == Fp8Storage.method:
        return _select_stored(model, config)
    specs = {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    groups = find_family(type(model).__name__).layer_groups(specs, "diffusers")
    ignored = _ignored_groups(config.ignored_layers, groups, specs)
    requested = requested_configs(config, groups)
    layers: dict[str, PlannedLayer] = {}
    chosen: list[tuple[str, QuantizationConfig]] = []
    for group, wanted in zip(groups, requested, strict=True):
        fmt = None if wanted is None or group in ignored else _quantizing_format(wanted, group, statistics)
        if wanted is None or fmt is None or _must_stay(fmt, group, specs):
            ignored += [group] if group not in ignored else []
            continue
        inputs = None if statistics is None else statistics.inputs_of(component, group.members)
        layers |= {stem: PlannedLayer(fmt, group, inputs) for stem in group.members}
        chosen += [(name, wanted) for name in group.names]
    if not layers:
        raise RecipeError(_nothing_selected(model, config, groups, requested, specs))
    spelled = replace(config, ignored_layers=tuple(ignored_names(ignored)))
    return layers, replace(spelled, layers=tuple(chosen)) if config.method == MIXED else spelled


def _nothing_selected(
    model: nn.Module,
    config: QuantizationConfig,
    groups: Collection[LayerGroup],
    requested: Collection[QuantizationConfig | None],
    specs: Mapping[str, TensorSpec],
) -> str:
    """The message, with the reason of the first layer whose shape does not fit, if there is one."""
    shapes = (
        declared_format(wanted).unsupported(rows, columns)
        for group, wanted in zip(groups, requested, strict=True)
        if wanted is not None and group.keep_reason is None
        for rows, columns in (specs[f"{stem}.weight"].shape for stem in group.members)
    )
    reason = next(filter(None, shapes), None)
    where = f"quantization: found no layer of {type(model).__name__} to quantize to {config.method}"
    return where + (f" ({reason})" if reason else "") + ", expected some"


def _quantizing_format(
    config: QuantizationConfig, group: LayerGroup, statistics: Statistics | None
) -> QuantizingFormat:
    """The format to quantize to while loading."""
    if config.is_static and statistics is None:
        raise RecipeError(
            f"quantization: static activations need calibration, found them of {config.method}; name a statistics file "
            "in input_scales, convert the model, or use 'dynamic', which is FP8_PER_CHANNEL_PER_TOKEN in ModelOpt's "
            "words"
        )
    return declared_format(config, is_fused=group.is_fused)


def _select_stored(model: nn.Module, config: QuantizationConfig) -> tuple[dict[str, PlannedLayer], QuantizationConfig]:
    """Every layer that can be stored, without groups."""
    layers = {
        name: PlannedLayer(
            Fp8Storage().for_weight(tuple(layer.get_parameter("weight").shape)),
            LayerGroup(name, (name,), is_fused=False),
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
