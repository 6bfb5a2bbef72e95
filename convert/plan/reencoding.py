"""Decides how a quantized component is written in another dialect without changing a value; no weight is read.

Formats that the dialect does not have, numbers that its spelling would round, and layers that vLLM-Omni would misread
are refused, with the name of the tensor.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omni_convert.convert.plan.target import other_linears
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.checks.scope import are_scales_equal, check_built, check_merged
from omni_convert.formats.dialects import vllm_omni
from omni_convert.formats.dialects.base import Dialect, WrittenSpelling
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError, OmniConvertError, RecipeError, counted
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import DIFFUSERS, LayerGroup
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.views.base import CheckpointView, dequantized_view, respelled_view
from omni_convert.formats.views.opened import QuantizedCheckpoint, QuantizedLayer

__all__ = ["Reencoding", "keeping_options", "reencode", "vllm_omni_refusal"]

# Dialects that both vLLM-Omni and our loader read.
READ_BY_VLLM_OMNI = ("vllm-omni", "modelopt")
INSTEAD = "-m METHOD quantizes again"
DIFFERING_SCALES = "layers that the runtime merges have scales that differ: it will quantize them again, to the largest"


@dataclass(frozen=True)
class Reencoding:
    """A component in another dialect.

    Attributes:
        view: its tensors as the dialect stores them
        block: the `quantization_config` of its config.json, or None
        metadata: free text for the headers of its files
        notes: what the user should know about the result
    """

    view: CheckpointView
    block: dict[str, Any] | None
    metadata: dict[str, str]
    notes: list[str]


def reencode(
    quantized: QuantizedCheckpoint,
    family: Family | None,
    recipe: Recipe,
    also_ignored: Sequence[str] = (),
    *,
    is_transformers: bool = False,
) -> Reencoding:
    """Brings a component to the recipe's dialect.

    Args:
        family: the model's family; None if no config names the model
        also_ignored: layers of other components that vLLM-Omni looks up in this one's block
        is_transformers: whether transformers loads the component, which needs its own kind of block

    Raises:
        CheckpointError: a layer cannot be expressed.
        RecipeError: the runtime cannot run the model.
    """
    dialect = DIALECTS[recipe.dialect].for_family(family)
    flaw = dialect.model_flaw(family, {layer.format.method for layer in quantized.layers.values()})
    if flaw is not None:
        raise RecipeError(f"--dialect {dialect.name}: {flaw}")
    if dialect.unproven is not None and not recipe.force:
        raise RecipeError(f"--dialect {dialect.name}: {dialect.unproven}; --force writes it all the same")
    if family is not None:
        fitted = {stem: _fitted(layer, dialect, family) for stem, layer in quantized.layers.items()}
        quantized = replace(quantized, layers=fitted)
    spellings = {stem: _spelling(layer, dialect, recipe) for stem, layer in quantized.layers.items()}
    rounded = _rounded_biases(quantized, spellings)
    if rounded and not recipe.force:
        stem, loss = next(iter(rounded.items()))
        raise CheckpointError(
            f"{quantized.checkpoint.path}: tensor '{stem}.bias': cannot be stored for {dialect.name} without a change: "
            f"{loss}; --force takes the nearest, or {INSTEAD}"
        )
    formats = {stem: layer.format for stem, layer in quantized.layers.items()}
    view = respelled_view(quantized, spellings)
    notes: list[str] = []
    is_for_us = is_transformers or any(fmt.is_storage for fmt in formats.values())
    if dialect.renames_tensors and not dialect.fills_vllm_omni_parameters:  # and has no block that lists any
        ignored = _not_as_readers_build(quantized, family, dialect)
    elif dialect.lists_built_layers and not is_for_us:
        ignored = _ignored_by_vllm_omni(quantized, family, recipe, dialect)
        notes = [DIFFERING_SCALES] if _has_differing_scales(quantized, family, recipe) else []
    else:
        kept = {name: quantized.checkpoint[stored] for name, stored in quantized.kept.items()}
        ignored = [*other_linears(kept), *_runtime_names(quantized, family, recipe)]
    ignored += also_ignored
    merged = _merged_names(quantized, family, recipe) if dialect.lists_runtime_names else {}
    try:
        block = (dialect.encoder_block if is_transformers else dialect.block)(formats | merged, ignored)
    except RecipeError as error:
        raise CheckpointError(f"{quantized.checkpoint.path}: {error}") from None
    kinds = Counter(fmt.label for fmt in formats.values())
    labels = ", ".join(f"{count} {label}" for label, count in kinds.items())
    but = f", but for the biases of {counted(len(rounded), 'layer')}" if rounded else ""
    what = f"{quantized.dialect} → {recipe.dialect}: {labels}; every value is kept{but}"
    full_precision = [stem for stem, layer in quantized.layers.items() if layer.stored.is_full_precision]
    metadata = dialect.kept_metadata(quantized.checkpoint.metadata) | dialect.metadata(formats, full_precision)
    lost = [stem for stem in full_precision if dialect.in_full_precision(spellings[stem]) is None]
    if lost:
        notes.append(
            f"marked to be multiplied in full precision: {counted(len(lost), 'layer')}; {dialect.name} cannot say so, "
            "and its readers quantize the inputs"
        )
    flaw = dialect.names_flaw(family, view) if family is not None and not is_transformers else None
    unproven = f"{dialect.name}: {dialect.unproven}" if dialect.unproven is not None else None
    return Reencoding(view, block, metadata, [what, *notes, *filter(None, [flaw, unproven])])


def _fitted(layer: QuantizedLayer, dialect: Dialect, family: Family) -> QuantizedLayer:
    """The layer in the format as the dialect's readers run it, which only concerns its inputs."""
    fmt = layer.format
    fitted = dialect.fitted_format(fmt, family, layer.stem) if isinstance(fmt, QuantizingFormat) else fmt
    return layer if fitted == fmt else replace(layer, stored=replace(layer.stored, format=fitted))


def _not_as_readers_build(quantized: QuantizedCheckpoint, family: Family | None, dialect: Dialect) -> list[str]:
    """Linears that readers build quantized, whatever the file holds, and that are not quantized."""
    kept = other_linears({name: quantized.checkpoint[stored] for name, stored in quantized.kept.items()})
    return [stem for stem in kept if family is not None and dialect.own_format(family, stem) is not None]


def _rounded_biases(quantized: QuantizedCheckpoint, spellings: Mapping[str, WrittenSpelling]) -> dict[str, str]:
    """Stem of each layer whose bias changes, since BF16 cannot hold what a spelling adds or takes away → the reason."""
    found: dict[str, str] = {}
    for stem, layer in quantized.layers.items():
        stored, written, read = quantized.kept.get(f"{stem}.bias"), spellings[stem], layer.stored.spelling
        if stored is None:
            continue
        if written.lacks_shift and not read.lacks_shift and getattr(layer.format, "shift", False):
            found[stem] = "it must lack what a shift of the inputs adds to outputs, and returns to 2^-8 of that"
        elif written.bias is not None and written.bias != read.bias:
            bias = quantized.checkpoint.read(stored)
            layout = TensorLayout(bias.dtype, layer.shape[:1], 0)
            loss = written.bias.loss(bias if read.bias is None else read.bias.decode(bias, layout))
            found |= {stem: loss} if loss is not None else {}
    return found


def _spelling(layer: QuantizedLayer, dialect: Dialect, recipe: Recipe) -> WrittenSpelling:
    where = f"{layer.checkpoint.path}: layer '{layer.stem}'"
    if layer.format.is_storage and not (dialect.has_storage and recipe.runtime == "diffusers"):
        raise CheckpointError(
            f"{where}: found fp8_storage, which our loader alone reads, expected --runtime diffusers and --dialect "
            "vllm-omni to keep it; `omni-convert dequantize` gives BF16"
        )
    is_linear = layer.stored.weight is None and len(layer.format.weight_shape(*layer.shape)) == 2
    if not is_linear and not layer.format.is_storage:
        raise CheckpointError(
            f"{where}: found codes called '{layer.stored.name_of('weight')}' of {layer.format.label}, which no dialect "
            f"is written with; {INSTEAD}, `omni-convert dequantize` gives BF16"
        )
    spelling = dialect.spelling(layer.format, layer.shape)
    if isinstance(spelling, str):
        raise CheckpointError(
            f"{where}: found {layer.format.label}, which {dialect.name} cannot hold: {spelling}; {INSTEAD}"
        )
    for suffix, layout in layer.tensors.items():
        if layout.rows_per_entry:
            continue
        loss = spelling.codec(suffix).loss(layer.read_tensor(suffix, 0, 0))
        if loss is not None and not recipe.force:
            raise CheckpointError(
                f"{layer.checkpoint.path}: tensor '{layer.stored.name_of(suffix)}': cannot be stored for "
                f"{dialect.name} without a change: {loss}; --force takes the nearest, or {INSTEAD}"
            )
    if layer.stored.is_full_precision:
        return dialect.in_full_precision(spelling) or spelling
    return spelling


def vllm_omni_refusal(quantized: QuantizedCheckpoint, family: Family | None, recipe: Recipe) -> str | None:
    """Why vLLM-Omni refuses or misreads a component in a dialect that it reads, or None."""
    assert quantized.dialect is not None, "it has layers"
    dialect = DIALECTS[quantized.dialect]
    flaw = dialect.block_flaw(quantized.block)
    if flaw is not None:
        return flaw
    try:
        _ignored_by_vllm_omni(quantized, family, recipe, dialect)
    except OmniConvertError as error:
        return str(error).removeprefix(f"{quantized.checkpoint.path}: ")
    return None


def keeping_options(
    quantized: QuantizedCheckpoint, family: Family | None, runtimes: Sequence[str], *, is_transformers: bool = False
) -> str | None:
    """The options with which a component is kept in a dialect that vLLM-Omni and our loader read.

    Args:
        family: as for `reencode`; None also if the tensors do not have diffusers' names, so that only formats decide
        runtimes: whose layers may be stored quantized, most wanted first

    Returns:
        None if no dialect can hold it without a change
    """
    for runtime, dialect in itertools.product(runtimes, READ_BY_VLLM_OMNI):
        recipe = Recipe(method="keep", dialect=dialect, runtime=runtime)
        try:
            if family is None:
                _ = [_spelling(layer, DIALECTS[dialect], recipe) for layer in quantized.layers.values()]
            else:
                reencode(quantized, family, recipe, is_transformers=is_transformers)
        except OmniConvertError:
            continue
        return f"-m keep --dialect {dialect}" + ("" if runtime == runtimes[0] else f" --runtime {runtime}")
    return None


def _runtime_names(quantized: QuantizedCheckpoint, family: Family | None, recipe: Recipe) -> list[str]:
    """The names that vLLM-Omni, which reads other dialects too, has for layers that are not quantized."""
    groups = _groups(quantized, family, recipe)
    return vllm_omni.ignored_names(group for group in groups if quantized.layers.keys().isdisjoint(group.members))


def _merged_names(quantized: QuantizedCheckpoint, family: Family | None, recipe: Recipe) -> dict[str, Format]:
    """Format of each merged layer whose parts agree, by every name that a runtime has for it."""
    named: dict[str, Format] = {}
    for group in _groups(quantized, family, recipe):
        parts = [quantized.layers[stem].format for stem in group.members if stem in quantized.layers]
        if len(parts) == len(group.members) and all(fmt == parts[0] for fmt in parts):
            named |= dict.fromkeys(group.names, parts[0])
    return named


def _groups(quantized: QuantizedCheckpoint, family: Family | None, recipe: Recipe) -> list[LayerGroup]:
    """The layers that the recipe's runtime builds quantized; none if the model is unknown."""
    if family is None:
        return []
    methods = {layer.format.method for layer in quantized.layers.values()}
    return family.layer_groups(dequantized_view(quantized), recipe.runtime, methods, recipe.dialect)


def _ignored_by_vllm_omni(
    quantized: QuantizedCheckpoint, family: Family | None, recipe: Recipe, dialect: Dialect
) -> list[str]:
    """The names to list as ignored.

    Args:
        dialect: in which the layers are, or will be, stored

    Raises:
        CheckpointError: vLLM-Omni builds other layers quantized than those that are stored quantized.
        RecipeError: it cannot run the model.
    """
    where = quantized.checkpoint.path
    if family is None:
        raise CheckpointError(
            f"{where}: found no config.json that names the model, expected one beside it: which layers vLLM-Omni "
            "builds quantized depends on the model"
        )
    method = next(iter(quantized.layers.values())).format.method
    refusal = None if recipe.force else family.refusal(recipe.runtime, method, recipe.dialect)
    if refusal is not None:
        raise RecipeError(f"{where}: {refusal.advice}")
    groups = _groups(quantized, family, recipe)
    kept = [group for group in groups if quantized.layers.keys().isdisjoint(group.members)]
    stored = [group for group in groups if group not in kept]
    flaws = itertools.chain(
        [] if recipe.force else check_built(quantized.layers, groups),
        *(check_merged(group, quantized.layers, dialect) for group in stored if recipe.runtime != DIFFUSERS),
    )
    error = next((flaw for flaw in flaws if flaw.severity == "error"), None)
    if error is not None:
        ours = ", --runtime diffusers is for our loader" if error.check == "not-built-quantized" else ""
        raise CheckpointError(f"{where}: '{error.layer}': {error.what}; {INSTEAD}{ours}")
    return vllm_omni.ignored_names(kept)


def _has_differing_scales(quantized: QuantizedCheckpoint, family: Family | None, recipe: Recipe) -> bool:
    """Whether FP8 layers that the runtime merges have a scale each, and not the same."""
    layers = quantized.layers
    groups = _groups(quantized, family, recipe)
    return not all(are_scales_equal([layers[stem] for stem in group.members if stem in layers]) for group in groups)
