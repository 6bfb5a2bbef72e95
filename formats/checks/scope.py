"""Checks a component against what vLLM-Omni builds of its model: which layers, merged how, under which names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from omni_convert.formats.checks.reading import TolerantReading
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.dialects.vllm_omni import ignored_names
from omni_convert.formats.errors import OmniConvertError, listed, nearest
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.finding import Finding
from omni_convert.formats.rows import tile_ranges
from omni_convert.formats.schemes.fp8 import FP8, fp8_block_size
from omni_convert.formats.schemes.int8 import INT8
from omni_convert.formats.views.opened import QuantizedLayer

__all__ = ["are_scales_equal", "check_built", "check_merged", "check_scope"]

RUNTIME = "vllm-omni"
VLLM_OMNI = "vLLM-Omni"
ANEW = "convert the original with omni-convert, which knows the model"


def check_scope(
    reading: TolerantReading, family: Family, encoder_layers: Sequence[str], stored_encoder_layers: Sequence[str] = ()
) -> Iterator[Finding]:
    """Everything that is wrong with the choice of layers.

    Args:
        family: of the model
        encoder_layers: unquantized linears of the text encoder that the runtime builds from the same block
        stored_encoder_layers: its linears that are stored quantized
    """
    quantized = reading.quantized
    methods = {layer.format.method for layer in quantized.layers.values()}
    refusals = (family.refusal(RUNTIME, method, quantized.dialect) for method in sorted(methods))
    refusal = next(filter(None, refusals), None)
    if refusal is not None:
        check = "unknown-scope" if family.is_generic else "unsupported-family"
        yield Finding(
            "error", check, "", refusal.reason, VLLM_OMNI, "use another method or dialect, or omni_convert.loaders"
        )
        return
    try:
        groups = family.layer_groups(_weights(reading), RUNTIME, methods, quantized.dialect)
    except OmniConvertError as error:
        if not reading.findings:
            yield Finding("error", "half-quantized-group", "", str(error), VLLM_OMNI, ANEW)
        return
    assert quantized.dialect is not None
    dialect = DIALECTS[quantized.dialect]
    ignored = dialect.ignored_entries(reading.found.block)
    if family.stage is not None or not dialect.is_dequantized_by_vllm_omni(methods):
        yield from check_built(reading.shapes, groups)
    damaged = {finding.layer for finding in reading.findings}
    for group in groups:
        if not any(name == stem or name.startswith(f"{stem}.") for name in damaged for stem in group.members):
            yield from _group(reading, group, ignored, dialect, is_stage=family.stage is not None)
    yield from _stacks(reading, groups)
    yield from _names(reading, groups, ignored, dialect, family, encoder_layers)
    wrong = [name for name in stored_encoder_layers if dialect.is_ignored(name, ignored)]
    if wrong:
        yield Finding(
            "error", "ignored-but-quantized", wrong[0],
            f"found {listed(['this layer of the text encoder', *wrong[1:]], 1)} in the ignored list, but quantized",
            f"{VLLM_OMNI}: takes the codes for weights", "remove the names from the list",
        )  # fmt: skip


def check_built(quantized: Iterable[str], groups: Iterable[LayerGroup]) -> Iterator[Finding]:
    """Reports layers that are stored quantized, but that the runtime builds unquantized.

    Args:
        quantized: stems of the quantized layers
        groups: the layers that the runtime builds quantized
    """
    built = {stem for group in groups for stem in group.members}
    for stem in quantized:
        if stem not in built:
            yield Finding(
                "error", "not-built-quantized", stem, "found it quantized, but the runtime builds it unquantized",
                f"{VLLM_OMNI}: takes the codes for weights, or a KeyError", "leave the layer unquantized",
            )  # fmt: skip


def check_merged(group: LayerGroup, layers: Mapping[str, QuantizedLayer], dialect: Dialect) -> Iterator[Finding]:
    """Reports why the runtime cannot build a group quantized, or cannot merge its members without loss.

    Args:
        layers: the checkpoint's quantized layers, at least one of which belongs to the group
        dialect: in which they are, or will be, stored
    """
    stored = [stem for stem in group.members if stem in layers]
    if len(stored) < len(group.members):
        missing = next(stem for stem in group.members if stem not in layers)
        yield Finding(
            "error", "half-quantized-group", missing,
            f"found it unquantized, but '{stored[0]}', with which it is merged, quantized",
            f"{VLLM_OMNI}: merges '{group.runtime_name}' into one layer", ANEW,
        )  # fmt: skip
    elif group.keep_reason is not None:
        yield Finding("error", "not-built-quantized", stored[0], group.keep_reason, VLLM_OMNI, "leave it unquantized")
    elif len(stored) > 1 and not dialect.takes_parts:
        yield Finding(
            "error", "part-of-merged-layer", stored[0], f"found a part of '{group.runtime_name}' by itself",
            f"{VLLM_OMNI}: raises an error on its wtscale", f"leave it and the other parts unquantized, or {ANEW}",
        )  # fmt: skip
    else:
        yield from _shared(group, [layers[stem] for stem in stored])


def _weights(reading: TolerantReading) -> dict[str, TensorSpec]:
    """Every layer as one weight, and what is not quantized."""
    checkpoint = reading.quantized.checkpoint
    layers = {f"{stem}.weight": TensorSpec(f"{stem}.weight", torch.float32, s) for stem, s in reading.shapes.items()}
    return layers | {name: checkpoint[stored] for name, stored in reading.quantized.kept.items() if name not in layers}


def _stacks(reading: TolerantReading, groups: Sequence[LayerGroup]) -> Iterator[Finding]:
    """Stacks of experts that are quantized in part."""
    layers = reading.quantized.layers
    quantized: dict[str, str] = {}
    for group in groups:
        if group.stack is not None and group.members[0] in layers:
            quantized.setdefault(group.stack, group.members[0])
    for group in groups:
        if group.stack in quantized and group.members[0] not in layers:
            yield Finding(
                "error", "half-quantized-group", group.members[0],
                f"found it unquantized, but '{quantized[group.stack]}', another expert, quantized",
                f"{VLLM_OMNI}: builds '{group.stack}' as one layer", ANEW,
            )  # fmt: skip


def _group(
    reading: TolerantReading, group: LayerGroup, ignored: Collection[str], dialect: Dialect, *, is_stage: bool
) -> Iterator[Finding]:
    layers = reading.quantized.layers
    stored = [stem for stem in group.members if stem in layers]
    names = group.names if group.stack is not None else (group.runtime_name, *group.members)
    listed = [name for name in names if dialect.is_ignored(name, ignored)]
    if not stored:
        # Only the stages have vLLM's own layers, of which some are never built quantized.
        is_left = is_stage and all(dialect.leaves_unlisted(reading.found.block, stem) for stem in group.members)
        if listed or not is_left:
            yield from _unquantized(group, listed, dialect)
    elif listed and len(stored) == len(group.members):
        yield Finding(
            "error", "ignored-but-quantized", stored[0], f"found it quantized, but '{listed[0]}' listed as ignored",
            f"{VLLM_OMNI}: takes the codes for weights", "remove the name from the list",
        )  # fmt: skip
    else:
        yield from check_merged(group, layers, dialect)


def _unquantized(group: LayerGroup, listed: Collection[str], dialect: Dialect) -> Iterator[Finding]:
    is_whole = dialect.ignores_merged_layers_by_name or len(listed) in (1, 1 + len(group.members))
    name = group.stack or group.runtime_name
    if name in listed and is_whole:
        return
    if not listed:
        yield Finding(
            "error", "not-ignored", group.members[0],
            f"found it unquantized, but '{name}' not listed as ignored",
            f"{VLLM_OMNI}: leaves its scale unset: garbage or NaN", f"list '{name}' and its parts",
        )  # fmt: skip
        return
    absent = next(name for name in (group.runtime_name, *group.members) if name not in listed)
    yield Finding(
        "error", "half-ignored-group", group.members[0],
            f"found '{next(iter(listed))}' listed as ignored, but not '{absent}'",
        f"{VLLM_OMNI}: looks up the merged name, or refuses parts that disagree",
        f"list '{group.runtime_name}' and all of its parts",
    )  # fmt: skip


def _shared(group: LayerGroup, layers: Sequence[QuantizedLayer]) -> Iterator[Finding]:
    """Members of a merged layer share what the runtime merges."""
    kinds = {(layer.format.label, *layer.tensors) for layer in layers}
    if len(kinds) > 1:
        described = sorted(f"{label} ({', '.join(suffixes)})" for label, *suffixes in kinds)
        what = f"found {' and '.join(described)} in what the runtime merges as '{group.runtime_name}'"
        yield Finding("error", "half-quantized-group", layers[0].stem, what, VLLM_OMNI, ANEW)
        return
    for suffix in ("weight_scale_2", "mul_scale", "smooth_factor", "lora_a", "input_scale"):
        if suffix in layers[0].tensors:
            first = layers[0].read_tensor(suffix, 0, 0)
            for layer in layers[1:]:
                if not layer.read_tensor(suffix, 0, 0).equal(first):
                    yield _differ(layer, suffix, group, "error" if suffix != "input_scale" else "warning")
    yield from _cut_blocks(group, layers)
    if not are_scales_equal(layers):
        yield _differ(layers[0], "weight_scale", group, "warning")
    if layers[0].format.encoding == INT8 and len(layers) > 1 and not _is_uniform(layers):
        yield Finding(
            "warning", "fused-members-differ", layers[0].stored.name_of("weight_scale"),
            f"found scales that differ from row to row in '{group.runtime_name}', which the runtime merges",
            "vLLM-Omni on CUDA: gives the rows other rows' scales, 12-29 % error; NPU is right",
            "convert with --int8-fused-scales shared",
        )  # fmt: skip


def _cut_blocks(group: LayerGroup, layers: Sequence[QuantizedLayer]) -> Iterator[Finding]:
    """Parts of a merged layer of FP8 in blocks whose last block would reach into the next part."""
    sizes = fp8_block_size(layers[0].format)
    if sizes is None or not group.is_fused:
        return
    for layer in layers:
        width = layer.shape[0] if len(layers) > 1 else layer.shape[0] // 2
        if width % sizes[0]:
            yield Finding(
                "error", "indivisible-width", layer.stem,
                f"found a part of {width} rows in blocks of {sizes[0]} in what the runtime merges as "
                f"'{group.runtime_name}'", f"{VLLM_OMNI}: gives rows the scales of another part", ANEW,
            )  # fmt: skip
            return


def are_scales_equal(layers: Sequence[QuantizedLayer]) -> bool:
    """Whether FP8 layers share one scale; true for any other format."""
    scales = {float(layer.read_tensor("weight_scale", 0, 0)) for layer in layers if layer.format.encoding == FP8}
    return len(scales) <= 1


def _is_uniform(layers: Sequence[QuantizedLayer]) -> bool:
    first: Tensor | None = None
    for layer in layers:
        for start, stop in tile_ranges((layer.shape[0], 1)):
            scales = layer.read_tensor("weight_scale", start, stop)
            first = scales.flatten()[0] if first is None else first
            if bool((scales != first).any()):
                return False
    return True


def _differ(layer: QuantizedLayer, suffix: str, group: LayerGroup, severity: str) -> Finding:
    is_error = severity == "error"
    return Finding(
        "error" if is_error else "warning", "fused-members-differ", layer.stored.name_of(suffix),
        f"found another value than in the other parts of '{group.runtime_name}', which the runtime merges",
        f"{VLLM_OMNI}: takes one for all, without requantizing" if is_error else
        f"{VLLM_OMNI}: takes the largest for all, and requantizes where it can", ANEW,
    )  # fmt: skip


def _names(
    reading: TolerantReading,
    groups: Sequence[LayerGroup],
    ignored: Sequence[str],
    dialect: Dialect,
    family: Family,
    encoder_layers: Sequence[str],
) -> Iterator[Finding]:
    """Ignored names that are nothing, and names of the encoder that are not ignored."""
    stems = {name.removesuffix(".weight") for name in _weights(reading) if name.endswith(".weight")}
    known = {*ignored_names(groups), *stems, *(stem.removesuffix(".0") for stem in stems), *encoder_layers}
    for entry in ignored:
        if any(dialect.is_ignored(name, (entry,)) for name in known) or _is_of_encoder(entry, family):
            continue
        near = nearest(entry, known)
        yield Finding(
            "warning", "ignored-unmatched", entry, "found it in the list of ignored layers, but it is no layer's name",
            f"{VLLM_OMNI}: compares whole names, so that it ignores nothing",
            f"did you mean '{near}'?" if near is not None else "remove it",
        )  # fmt: skip
    absent = [name for name in encoder_layers if not dialect.is_ignored(name, ignored)]
    if absent:
        yield Finding(
            "error", "not-ignored", absent[0],
            f"found {listed(['this layer of the text encoder', *absent[1:]], 1)} not listed as ignored",
            f"{VLLM_OMNI}: builds them from the same block: garbage", "list them, or convert the whole pipeline",
        )  # fmt: skip


def _is_of_encoder(entry: str, family: Family) -> bool:
    plain = entry.replace("[", "").replace("]", "")  # with which ModelOpt's patterns match one name alone
    return family.shared_encoder is not None and family.shared_encoder.is_name(plain)
