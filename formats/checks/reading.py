"""Reads a damaged checkpoint as far as it goes: the layers that can be read, and a finding for each that cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from omni_convert.formats.checks.completeness import Gap, block_gaps, without_weight
from omni_convert.formats.checks.tensors import check_layer
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import CODES, COMPANIONS, LOW_BIT, WEIGHT
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.dialects.base import Dialect, Found, StoredLayer
from omni_convert.formats.dialects.gguf import GGUF
from omni_convert.formats.dialects.table import DIALECTS, find_dialect
from omni_convert.formats.dialects.verdict import OURS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.finding import Finding
from omni_convert.formats.views.opened import QuantizedCheckpoint, QuantizedLayer

__all__ = ["LenientReading", "read_leniently"]

# What a whole file is marked with; every part of it needs it to be read.
GLOBAL_LEAF = "scaled_fp8"
HEADER_MARKS = "_quantization_metadata"


@dataclass(frozen=True)
class LenientReading:
    """What can be read of a checkpoint.

    Attributes:
        quantized: the checkpoint, with the layers whose values can be looked at
        shapes: stem to [out, in] of these and of the layers that are damaged but known
        findings: what is wrong with the rest
    """

    found: Found
    quantized: QuantizedCheckpoint
    shapes: dict[str, tuple[int, int]]
    findings: list[Finding]


class _Part(Checkpoint):
    """Some of the tensors of a checkpoint."""

    def __init__(self, source: Checkpoint, names: Iterable[str]) -> None:
        self.path, self.files = source.path, source.files
        self._specs = {name: source[name] for name in names}
        self.weight_map = {name: source.weight_map[name] for name in self._specs}


def read_leniently(found: Found) -> LenientReading:
    """Reads headers, configs and tiny markers of a checkpoint, whatever is wrong with it."""
    dialect = find_dialect(found)
    checkpoint = found.checkpoint
    if dialect is None:
        kept = {name: name for name in checkpoint}
        plain = QuantizedCheckpoint(checkpoint, None, {}, kept, found.block)
        return LenientReading(found, plain, {}, list(_orphans(found, set(), "")))
    stored, findings = _stored_layers(dialect, found)
    unread = {name for finding in findings for name in _under(found, finding)}
    layers: dict[str, QuantizedLayer] = {}
    used: set[str] = set()
    for each in stored:
        layer = QuantizedLayer(checkpoint, each, each.format.layout(*each.shape))
        used |= {name for name in layer.sources if name in checkpoint}
        flaws = list(check_layer(layer, dialect.name))
        findings += flaws
        if not any(flaw.severity == "error" and flaw.check in BREAKING for flaw in flaws):
            layers[each.stem] = layer
    findings += _orphans(found, used | unread, DIALECTS[dialect.name].consumers)
    rest = [name for name in checkpoint if name not in used]
    kept = dialect.kept_names(found, rest)
    quantized = QuantizedCheckpoint(checkpoint, dialect.name, layers, kept, found.block)
    shapes = {each.stem: each.shape for each in stored}
    damaged = {finding.layer for finding in findings if finding.check != "extra-companion"}
    findings += [_missing(gap) for gap in block_gaps(quantized, shapes) if gap.name.rpartition(".")[0] not in damaged]
    return LenientReading(found, quantized, shapes, findings)


# With these a layer has no values that could be looked at.
BREAKING = ("missing-companion", "silent-cast", "wrong-dtype", "wrong-shape", "scale-order", "indivisible-width")


def _under(found: Found, finding: Finding) -> list[str]:
    return [name for name in found.checkpoint if name.startswith(f"{finding.layer}.")]


def _stored_layers(dialect: Dialect, found: Found) -> tuple[list[StoredLayer], list[Finding]]:
    try:
        return list(dialect.stored_layers(found)), []
    except CheckpointError as error:
        first = error
    findings: list[Finding] = []
    damaged: set[str] = set()
    for stem, names in _stems(found).items():
        try:
            list(dialect.stored_layers(_restricted(found, names)))
        except CheckpointError as error:
            damaged.add(stem)
            findings.append(_unreadable(found, stem, names, error, dialect.name))
    rest = {name for stem, names in _stems(found).items() if stem not in damaged for name in names}
    try:
        return list(dialect.stored_layers(_restricted(found, rest))), findings
    except CheckpointError as error:
        return [], [*findings, _as_finding("unreadable-layer", found, "", error if damaged else first, dialect.name)]


def _stems(found: Found) -> dict[str, list[str]]:
    """Names of tensors by what stands before their last dot; those that only a mark in the header names, too."""
    stems: dict[str, list[str]] = {}
    for name in found.checkpoint:
        stems.setdefault(name.rpartition(".")[0], []).append(name)
    for stem in _header_marks(found):
        if not any(known == stem or known.endswith(f".{stem}") for known in stems):
            stems[stem] = []
    return stems


def _header_marks(found: Found) -> Mapping[str, object]:
    try:
        marks = json.loads(found.metadata.get(HEADER_MARKS, "{}")).get("layers", {})
    except (ValueError, RecursionError, AttributeError):
        return {}
    return marks if isinstance(marks, Mapping) else {}


def _restricted(found: Found, names: Collection[str]) -> Found:
    """The same description of some tensors only, and of what marks the file as a whole."""
    kept = {*names, *(name for name in found.checkpoint if name.rpartition(".")[2] == GLOBAL_LEAF)}
    stems = {name.rpartition(".")[0] for name in kept}
    metadata = dict(found.metadata)
    if marks := _header_marks(found):
        inside = {stem: mark for stem, mark in marks.items() if any(_is_named(stem, each) for each in stems)}
        metadata[HEADER_MARKS] = json.dumps({"layers": inside})
    labels = {name: label for name, label in found.labels.items() if name in kept}
    return replace(found, checkpoint=_Part(found.checkpoint, kept), metadata=metadata, labels=labels)


def _is_named(mark: str, stem: str) -> bool:
    return stem == mark or stem.endswith(f".{mark}")


def _unreadable(found: Found, stem: str, names: Collection[str], error: CheckpointError, dialect: str) -> Finding:
    """A layer that its dialect cannot read, as the most telling of the findings."""
    leaves = {name.rpartition(".")[2]: found.checkpoint[name] for name in names}
    message = str(error)
    check = "unreadable-layer"
    if dialect == GGUF.name:
        pass  # it has no companions
    elif re.search(r"comfy_quant|ComfyUI's format|convrot|found type", message):
        check = "bad-mark"
    elif "is missing" in message or not _has_scales(leaves):
        check = "missing-companion"
    return _as_finding(check, found, stem, error, dialect)


def _has_scales(leaves: Mapping[str, TensorSpec]) -> bool:
    scale = next((leaves[leaf] for leaf in ("weight_scale", "scale_weight", "scales") if leaf in leaves), None)
    if scale is None:
        return False
    # NVFP4's block scales mean nothing without the scale above them.
    return scale.dtype is not torch.float8_e4m3fn or any("scale_2" in leaf or "global" in leaf for leaf in leaves)


def _as_finding(check: str, found: Found, stem: str, error: CheckpointError, dialect: str) -> Finding:
    what = str(error).removeprefix(f"{found.checkpoint.path}: ").removeprefix(f"layer '{stem}': ")
    return Finding("error", check, stem, what, DIALECTS[dialect].consumers, "convert the model again")


def _orphans(found: Found, used: Collection[str], consumer: str) -> Iterator[Finding]:
    """Tensors that look like parts of quantized layers and are none."""
    layers = {name.rpartition(".")[0] for name in used}
    bare: dict[str, str | None] = {}
    for name, spec in found.checkpoint.items():
        stem, _, leaf = name.rpartition(".")
        if name in used or bare.get(stem) is not None:
            continue
        if leaf in CODES and spec.dtype in LOW_BIT and len(spec.shape) == 2:
            yield _without_scale(found, stem, spec, consumer)
        elif leaf in COMPANIONS and not _has_codes(found, stem, layers):
            bare[stem] = None if stem in layers else without_weight(found.checkpoint, stem)
            if (what := bare[stem]) is not None:
                yield _bare(stem, what, consumer)
            else:
                yield _extra(found, name, stem, is_quantized=stem in layers, consumer=consumer)


def _has_codes(found: Found, stem: str, layers: Collection[str]) -> bool:
    """Whether there is a weight that would need the companions, and is reported itself."""
    weights = (found.checkpoint.get(f"{stem}.{leaf}") for leaf in CODES)
    return stem not in layers and any(spec is not None and spec.dtype in LOW_BIT for spec in weights)


def _without_scale(found: Found, stem: str, spec: TensorSpec, consumer: str) -> Finding:
    beside = [leaf for leaf in COMPANIONS if f"{stem}.{leaf}" in found.checkpoint]
    have = f"{' and '.join(beside)}, which do not make a format with them" if beside else "no scale"
    if not consumer and beside and not found.block:
        return Finding(
            "error", "no-block", stem, f"found {DTYPE_NAMES[spec.dtype]} codes with {' and '.join(beside)}, but no "
            "quantization_config that says what they are", "every runtime: takes codes for weights, or misses tensors",
            "restore config.json, or convert again",
        )  # fmt: skip
    if not consumer:  # weights cast to FP8 and nothing else are common, and run
        return Finding(
            "warning", "missing-companion", stem, f"found {DTYPE_NAMES[spec.dtype]} codes with {have}",
            "runtimes that do not take them for plain numbers", "keep the scales when renaming, or convert again",
        )  # fmt: skip
    return Finding(
        "error", "missing-companion", stem, f"found {DTYPE_NAMES[spec.dtype]} codes with {have}, expected scales",
        f"{consumer}: takes the codes for weights, or reports missing keys", "convert the model again",
    )  # fmt: skip


def _extra(found: Found, name: str, stem: str, *, is_quantized: bool, consumer: str) -> Finding:
    weight = found.checkpoint.get(f"{stem}.weight")
    if is_quantized or weight is None:
        what = "found a tensor that the layer's format does not have"
    else:
        what = f"found it beside a {DTYPE_NAMES[weight.dtype]} weight, which is not quantized"
    return Finding(
        "error", "extra-companion", name, f"{what}, expected none", _of_strangers(consumer),
        "remove the tensor, or convert the model again",
    )  # fmt: skip


def _bare(stem: str, what: str, consumer: str) -> Finding:
    return Finding(
        "error", "extra-companion", stem, f"{what}, expected '{stem}{WEIGHT}' beside them", _of_strangers(consumer),
        "give the weight its name, or convert the model again",
    )  # fmt: skip


def _of_strangers(consumer: str) -> str:
    """Whom a tensor hurts that is for nothing."""
    others = f"{consumer or 'strict loaders'}: a KeyError for some models (vLLM-Omni: Z-Image, FLUX.1), else skipped"
    return f"{OURS}: refuses the model; {others}"


def _missing(gap: Gap) -> Finding:
    remedy = f"rename '{gap.stray}'" if gap.stray else "download it again"
    return Finding(
        "error", "missing-tensor", gap.name, gap.reason,
        f"{OURS}, and whoever else is strict: refuses the model; others leave the tensor unset",
        f"{remedy}, or convert the model again",
    )  # fmt: skip
