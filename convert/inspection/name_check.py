"""Checks that a component has the tensors of the model that its config describes: no more, no fewer.

The class is built on the meta device, where weights are only shapes. A component whose class cannot be built, or whose
names differ from those of the class, is not checked: a false alarm would be worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from omni_convert.convert.source.built_model import built_model
from omni_convert.formats.checks.reading import TolerantReading
from omni_convert.formats.containers.names import COMPANIONS
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.table import find_family, model_class
from omni_convert.formats.finding import Finding
from omni_convert.formats.views.base import dequantized_view
from omni_convert.formats.views.original_names import (
    convert_names,
    may_have_original_names,
    shapes_of,
)

__all__ = ["check_converted_names", "check_names", "has_converted_names"]

# Findings of each kind; the last tells how many more there are.
MOST_FINDINGS = 20
#: Names that libraries translate while they load: of attention in old VAEs of diffusers.
TRANSLATED = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")


@dataclass(frozen=True)
class _Expected:
    """The tensors of a class.

    Attributes:
        parameters: names of the parameters that its files hold, each once
        names: names of everything in its state
        ties: names of one tensor each, of which a file need have only one
        optional: patterns of names that may be missing or left over
    """

    parameters: Collection[str]
    names: Collection[str]
    ties: tuple[frozenset[str], ...]
    optional: tuple[str, ...]
    is_of_diffusers: bool


def check_names(reading: TolerantReading, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Tensors that are missing, and tensors that the model has no use for.

    Args:
        config: config of the component; {} if there is none
    """
    if reading.is_unreadable or (reading.found.block and reading.quantized.dialect is None):
        return  # its tool may have any names
    yield from check_markers(reading, config)
    kept = [name for name in reading.quantized.kept if name.rpartition(".")[2] not in COMPANIONS]
    weights = [layer.stored.weight_name for layer in reading.quantized.layers.values()]
    found = {*kept, *weights, *(f"{stem}.weight" for stem in reading.shapes)}
    expected = _expected(config)
    if expected is None or 2 * len(found & {*expected.names}) < len(found):
        return
    optional = re.compile("|".join(f"(?:{pattern})" for pattern in expected.optional) or r"(?!)")
    tied = {name for group in expected.ties if group & found for name in group}
    damaged = {finding.layer for finding in reading.findings}
    missing = [
        name
        for name in expected.parameters
        if name not in found and name not in tied and not optional.search(name) and not _is_of(name, damaged)
    ]
    strange = [name for name in found if name not in expected.names and not optional.search(name)]
    if missing and strange and (may_have_original_names(reading.found.checkpoint) or _is_translated(strange, expected)):
        return  # what is missing may be there under a name that the library translates
    markers = find_family(model_class(config)).every_marker if _may_be_for_comfyui(reading) else frozenset()
    unknown = [name for name in kept if name in {*strange} - markers and not _is_of(name, damaged)]
    yield from _first(missing, _missing, model_class(config))
    yield from _first(unknown, _unknown, model_class(config))


def check_markers(reading: TolerantReading, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a file for ComfyUI has the marker tensors of the variant that its config describes, and no others."""
    family, names = find_family(model_class(config)), reading.quantized.kept
    wanted = family.markers_of(config)
    for key, marker in family.markers if _may_be_for_comfyui(reading) else ():
        dialect = reading.quantized.dialect
        if marker in names and marker not in wanted:
            what = f"found it, by which ComfyUI sets {key}, but no {key} in config.json, expected both or none"
            yield Finding(
                "error", "bad-mark", marker, what, "ComfyUI or diffusers: another model", "correct config.json"
            )
        elif marker in wanted and marker not in names and dialect is not None:
            what = f"found no such tensor, expected it as config.json says {key}"
            hurts = "ComfyUI: takes it for the model without"
            yield Finding("error", "bad-mark", marker, what, hurts, "convert it again: -m keep, or -m METHOD")


def _may_be_for_comfyui(reading: TolerantReading) -> bool:
    """Whether ComfyUI reads such a file: one in a dialect of its own, or not quantized and not in diffusers' files."""
    dialect = reading.quantized.dialect
    if dialect is None:
        return may_have_original_names(reading.found.checkpoint)
    return DIALECTS[dialect].names_expected not in ("diffusers", "others")


def has_converted_names(reading: TolerantReading, config: Mapping[str, Any]) -> bool:
    """Whether a component is for readers that convert names, or has those of the model's own code."""
    if reading.quantized.dialect is None:
        return False
    dialect, family = DIALECTS[reading.quantized.dialect], find_family(model_class(config))
    names = (*reading.quantized.kept, *(f"{stem}.weight" for stem in reading.quantized.layers))
    return dialect.names_expected == "both" or (dialect.renames_tensors and dialect.are_names_of_readers(family, names))


def check_converted_names(reading: TolerantReading, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a component whose readers convert names is the model of its config, under any names that they know."""
    import diffusers

    yield from check_markers(reading, config)
    if model_class(config) == "unknown" or reading.findings:
        return
    quantized = reading.quantized
    consumers = DIALECTS[quantized.dialect].consumers if quantized.dialect is not None else ""
    view = dequantized_view(quantized)
    try:
        converted = convert_names(view, config)
    except CheckpointError as error:
        what = str(error).removeprefix(f"{quantized.checkpoint.path}: ")
        yield Finding(
            "error", "unknown-names", "", what, f"{consumers}: refuse it or miss weights", "convert the model again"
        )
        return
    if converted is not None or not hasattr(diffusers, model_class(config)):
        return
    for name, shape in shapes_of(getattr(diffusers, model_class(config)), config).items():
        if name in view and view[name].elements != math.prod(shape):
            what = f"found {list(view[name].shape)}, expected {list(shape)} by the config beside it"
            yield Finding("error", "wrong-shape", name, what, f"{consumers}: refuse it", "convert the model again")


def _first(names: Sequence[str], finding: Callable[[str, str], Finding], class_name: str) -> Iterator[Finding]:
    """Yields a finding for each of the first names; the last finding counts the others."""
    found = [finding(name, class_name) for name in names[:MOST_FINDINGS]]
    if len(names) > MOST_FINDINGS:
        found[-1] = replace(found[-1], what=f"{found[-1].what}; so {len(names) - MOST_FINDINGS} more")
    yield from found


def _is_of(name: str, layers: Collection[str]) -> bool:
    return name in layers or name.rpartition(".")[0] in layers


def _is_translated(strange: Iterable[str], expected: _Expected) -> bool:
    """Whether the library may know these names; transformers translates many."""
    return not expected.is_of_diffusers or any(map(TRANSLATED.search, strange))


def _missing(name: str, class_name: str) -> Finding:
    return Finding(
        "error", "missing-tensor", name, f"found none, expected it in {class_name} as config.json describes it",
        "every runtime: refuses the model, or leaves the tensor unset", "download or convert it again",
    )  # fmt: skip


def _unknown(name: str, class_name: str) -> Finding:
    return Finding(
        "warning", "unknown-names", name, f"found it, but {class_name} as config.json describes it has no such tensor",
        "vLLM-Omni: a KeyError for some models; diffusers, transformers: drop it", "remove it, or correct config.json",
    )  # fmt: skip


def _expected(config: Mapping[str, Any]) -> _Expected | None:
    """The tensors of the class that a config names; None if the class cannot be built."""
    is_of_diffusers = "_class_name" in config
    model = built_model(config)
    if model is None:
        return None
    patterns = (getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or () for kind in ("missing", "unexpected"))
    tied = getattr(model, "_tied_weights_keys", None) or ()
    return _Expected(
        [name for name, _ in model.named_parameters()],
        model.state_dict().keys(),
        tuple(_ties(model)),
        (*(pattern for group in patterns for pattern in group), *tied),
        is_of_diffusers,
    )


def _ties(model: torch.nn.Module) -> Iterator[frozenset[str]]:
    """Names of one parameter, whether it is shared already or the library shares it when it has loaded."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield from (frozenset(group) for group in names.values() if len(group) > 1)
    later = getattr(model, "all_tied_weights_keys", None)
    if isinstance(later, Mapping):
        yield from (frozenset(pair) for pair in later.items())
