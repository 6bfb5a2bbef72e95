"""`inspect`: the dialect of each component, the format of each layer, and which runtimes load the model.

Only headers, configs and tiny marker tensors are read, no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_convert.convert.inspection.lost_block import dialect_of_lost_block
from omni_convert.convert.plan.reencoding import keeping_options, vllm_omni_refusal
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.report import size_text
from omni_convert.convert.source.built_model import names_in_model
from omni_convert.convert.source.component_folder import ComponentFolder, folders_with_weights
from omni_convert.convert.source.location import Source
from omni_convert.convert.terminal import MAX_WIDTH, terminal_width, wrapped
from omni_convert.formats.checks.completeness import incomplete
from omni_convert.formats.checks.meaning import doubts
from omni_convert.formats.checks.stage import stage_refusal
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.base import JudgedComponent
from omni_convert.formats.dialects.found import describe
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.dialects.verdict import (
    NOT_OF_DIFFUSERS,
    OURS,
    VLLM_OMNI,
    Verdict,
    if_incomplete,
    lost_block_verdicts,
    with_remedy,
    without_class,
)
from omni_convert.formats.dialects.vllm_omni import vllm_omni_verdict
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.stage import Stage
from omni_convert.formats.views.base import FLOAT8
from omni_convert.formats.views.opened import QuantizedCheckpoint, QuantizedLayer, read_layers
from omni_convert.formats.views.original_names import layers_under_diffusers_names

__all__ = [
    "InspectedComponent",
    "InspectedLayer",
    "inspect_source",
    "inspection_report",
]

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
PLAIN = "not quantized"


@dataclass(frozen=True)
class InspectedLayer:
    """A quantized layer.

    Attributes:
        format: label of its format
        shape: [out, in]
        tensors: name of each of its tensors in the file → dtype and shape there
        nbytes: size of these tensors
    """

    name: str
    format: str
    shape: tuple[int, int]
    tensors: dict[str, str]
    nbytes: int


@dataclass(frozen=True)
class InspectedComponent:
    """A component of the model.

    Attributes:
        name: its folder, or "" for a model that is a single component
        dialect: dialect of its quantized layers; None if there are none
        kept: number and bytes of its other tensors, by dtype
        runtimes: the verdict of each runtime; none for a component that is not quantized
        doubt: why its meaning is not certain; None if it is
        is_unreadable: it is known what the component is, and nothing of it is read here
    """

    name: str
    dialect: str | None
    nbytes: int
    layers: tuple[InspectedLayer, ...]
    kept: dict[str, tuple[int, int]]
    runtimes: tuple[Verdict, ...]
    doubt: str | None = None
    is_unreadable: bool = False


def inspect_source(source: Source) -> list[InspectedComponent]:
    """Inspects every component that has weights.

    Raises:
        CheckpointError: a file is damaged.
    """
    return [_inspect(component) for component in folders_with_weights(source)]


def _inspect(component: ComponentFolder) -> InspectedComponent:
    reading = read_layers(describe(component.checkpoint(), component.folder))
    with reading.quantized as opened:
        lost = dialect_of_lost_block(component, opened)
        doubt = next((f"{each.layer or 'the file'}: {each.what}" for each in doubts(reading)), None)
        kept: dict[str, tuple[int, int]] = {}
        for stored in opened.kept.values():
            spec = opened.checkpoint[stored]
            count, nbytes = kept.get(DTYPE_NAMES[spec.dtype], (0, 0))
            kept[DTYPE_NAMES[spec.dtype]] = (count + 1, nbytes + spec.nbytes)
        unread = reading.dialect if reading.is_unreadable else None
        return InspectedComponent(
            component.name,
            unread.shown_name(reading.found) if unread is not None else lost or opened.shown_dialect,
            sum(spec.nbytes for spec in opened.checkpoint.values()),
            tuple(_inspect_layer(layer) for layer in opened.layers.values()),
            kept,
            unread.usual_verdicts
            if unread is not None
            else tuple(lost_block_verdicts() if lost else _runtimes(component, opened, doubt)),
            doubt,
            unread is not None,
        )


def _inspect_layer(layer: QuantizedLayer) -> InspectedLayer:
    specs = [layer.checkpoint[name] for name in layer.sources]
    tensors = {spec.name: f"{DTYPE_NAMES[spec.dtype]} {list(spec.shape)}" for spec in specs}
    return InspectedLayer(layer.stem, layer.format.label, layer.shape, tensors, layer.nbytes)


def _runtimes(component: ComponentFolder, opened: QuantizedCheckpoint, doubt: str | None) -> list[Verdict]:
    if opened.shown_dialect is None:
        return []
    formats = {stem: layer.format for stem, layer in opened.layers.items()}
    dialect, family = DIALECTS[opened.shown_dialect], component.served_family
    refusal = vllm_omni_refusal(opened, family, Recipe()) if dialect.fills_vllm_omni_parameters else None
    if component.stage is not None:
        found = _stage_runtimes(component, component.stage, opened)
    else:
        found = dialect.verdicts(JudgedComponent(formats, refusal, opened.checkpoint, family))
        found = with_remedy(found, lambda runtime: _keeping_options(component, opened, runtime))
        refused = family.refusal("diffusers") if family is not None else None
        found = without_class(found, refused.reason) if refused is not None else found
    flaw = incomplete(opened, names_in_model(opened.checkpoint, component.config_if_any))
    if flaw is None:
        return found if doubt is None else if_incomplete(found, (OURS,), doubt)
    # vLLM-Omni leaves a missing scale unset, with a warning.
    strict = {*dialect.strict_runtimes} - ({VLLM_OMNI} if flaw.is_scale else set())
    return if_incomplete(found, strict, flaw.reason)


def _keeping_options(component: ComponentFolder, opened: QuantizedCheckpoint, runtime: str) -> str | None:
    """The options with which a runtime gets every value of a component."""
    runtimes = ("vllm-omni", "diffusers") if runtime == OURS else ("vllm-omni",)
    family = component.served_family
    try:
        named = opened if family is None else layers_under_diffusers_names(opened, component.config)[0]
    except CheckpointError:  # a layer cannot be split without a change
        return None
    return keeping_options(named, family, runtimes, is_transformers=component.is_transformers)


def _stage_runtimes(component: ComponentFolder, stage: Stage, opened: QuantizedCheckpoint) -> list[Verdict]:
    """The verdicts on a repository with stages, which vLLM-Omni alone runs quantized."""
    formats = [layer.format for layer in opened.layers.values()]
    assert opened.shown_dialect is not None
    refusal = stage_refusal(stage, component.config, DIALECTS[opened.shown_dialect], formats) or vllm_omni_refusal(
        opened, component.served_family, Recipe(dialect=opened.shown_dialect)
    )
    return [vllm_omni_verdict({fmt.method for fmt in formats}, refusal), NOT_OF_DIFFUSERS]


def inspection_report(source: Source, components: list[InspectedComponent], *, as_json: bool) -> Iterator[str]:
    """A table in which layers that differ only in a block's number share a line; or everything as one JSON document."""
    if as_json:
        document: dict[str, Any] = {
            "path": str(source.path),
            "components": [asdict(component) for component in components],
        }
        yield json.dumps(document, indent=2)
        return
    for component in components:
        yield from _component_lines(component, source.path)


def _component_lines(component: InspectedComponent, path: Path) -> Iterator[str]:
    spelled = f"spelled as {component.dialect} does" if component.dialect else PLAIN
    spelled = f"{component.dialect}, which is not read here" if component.is_unreadable else spelled
    yield f"{component.name or path.name}: {size_text(component.nbytes)}, {spelled}"
    yield from _table(component.layers)
    kept = ", ".join(f"{count} {dtype} ({size_text(nbytes)})" for dtype, (count, nbytes) in component.kept.items())
    if kept:
        yield from _indented(f"other tensors: {kept}")
    if component.doubt is None and component.kept.keys() & {DTYPE_NAMES[dtype] for dtype in FLOAT8}:
        yield from _indented(
            "FP8 numbers without scales are weights that were cast: every command reads them as they are"
        )
    if component.doubt is not None:
        yield from _indented(f"its meaning is NOT CERTAIN: {component.doubt}")
    for verdict in component.runtimes:
        word = {"loads": "loads", "wrong": "LOADS WRONG", "refuses": "refuses"}[verdict.outcome]
        yield from _indented(f"{verdict.runtime}: {word}: {verdict}")


def _table(layers: Sequence[InspectedLayer]) -> list[str]:
    """One line for all layers that differ only in a block's number; long lists of their tensors go into a legend."""
    alike: dict[tuple[str, ...], list[InspectedLayer]] = {}
    for layer in layers:
        stored = NUMBER.sub("*", ", ".join(f"{name} {what}" for name, what in _by_suffix(layer).items()))
        alike.setdefault((NUMBER.sub("*", layer.name), layer.format, stored), []).append(layer)
    cells = [_cells(pattern, label, same) for (pattern, label, _), same in alike.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    wide = [f"  {line}  {stored}" for line, (_, _, stored) in zip(lines, alike, strict=True)]
    width = terminal_width(max(map(len, wide), default=0))
    if all(len(line) <= width for line in wide):
        return wide
    kinds = {(same[0].format, _dtypes(same[0])): None for same in alike.values()}
    legend = [line for label, stored in kinds for line in _indented(f"{label} is stored as {stored} (shapes: --json)")]
    return [*(f"  {line}".rstrip() for line in lines), *legend]


def _cells(pattern: str, label: str, layers: Sequence[InspectedLayer]) -> tuple[str, ...]:
    shape = "x".join(map(str, layers[0].shape))
    return pattern, f"{len(layers):>3} x {shape}", label, f"{size_text(sum(layer.nbytes for layer in layers)):>8}"


def _by_suffix(layer: InspectedLayer) -> dict[str, str]:
    return {name.removeprefix(layer.name).lstrip("."): what for name, what in layer.tensors.items()}


def _dtypes(layer: InspectedLayer) -> str:
    parts = (f"{NUMBER.sub('*', name)} {what.partition(' ')[0]}" for name, what in _by_suffix(layer).items())
    return ", ".join(parts)


def _indented(text: str) -> list[str]:
    return wrapped(text, "  ", "    ", MAX_WIDTH)
