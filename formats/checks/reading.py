"""Reads a damaged checkpoint as far as it goes: the layers that can be read, and a finding for each that cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from omni_convert.formats.checks.completeness import Gap, block_gaps, without_weight
from omni_convert.formats.checks.tensors import check_layer
from omni_convert.formats.checks.undeclared import UndeclaredCodes, undeclared_codes
from omni_convert.formats.containers.names import CODES, COMPANIONS, LOW_BIT, WEIGHT
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.base import LayerError
from omni_convert.formats.dialects.found import Found
from omni_convert.formats.dialects.verdict import OURS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.finding import Finding
from omni_convert.formats.views.opened import QuantizedCheckpoint, read_layers

__all__ = ["TolerantReading", "read_tolerantly"]

# A layer with one of these has no values that could be checked.
BREAKING = ("silent-cast", "wrong-shape", "indivisible-width")


@dataclass(frozen=True)
class TolerantReading:
    """What can be read of a checkpoint.

    Attributes:
        quantized: the checkpoint, with the layers whose values can be checked
        shapes: stem to [out, in] of these and of the layers that are damaged but known
        findings: what is wrong with the rest
    """

    found: Found
    quantized: QuantizedCheckpoint
    shapes: dict[str, tuple[int, int]]
    findings: list[Finding]


def read_tolerantly(found: Found) -> TolerantReading:
    """Reads headers, configs and tiny markers of a checkpoint, whatever is wrong with it."""
    reading = read_layers(found)
    checkpoint, dialect = found.checkpoint, reading.dialect
    if dialect is None:
        findings = [_as_finding(found, error, "every runtime") for error in reading.errors]
        return TolerantReading(found, reading.quantized, {}, [*findings, *_orphans(found, set(), "")])
    findings = [_as_finding(found, error, dialect.consumers) for error in reading.errors]
    is_readable = all(isinstance(error, LayerError) for error in reading.errors)
    unread = {name for finding in findings for name in checkpoint if name.startswith(f"{finding.layer}.")}
    known = (*reading.layers.values(), *reading.damaged)
    flaws = {layer.stem: list(check_layer(layer, dialect.name)) for layer in known}
    findings += [flaw for each in flaws.values() for flaw in each]
    used = {name for layer in known for name in layer.sources if name in checkpoint}
    findings += _orphans(found, used | unread, dialect.consumers) if is_readable else ()
    quantized = reading.quantized
    layers = {stem: layer for stem, layer in quantized.layers.items() if not _is_broken(flaws[stem])}
    shapes = {layer.stem: layer.shape for layer in known}
    damaged = {finding.layer for finding in findings if finding.check != "extra-companion"}
    findings += [_missing(gap) for gap in block_gaps(quantized, shapes) if gap.name.rpartition(".")[0] not in damaged]
    return TolerantReading(found, replace(quantized, layers=layers), shapes, findings)


def _is_broken(flaws: Collection[Finding]) -> bool:
    return any(flaw.severity == "error" and flaw.check in BREAKING for flaw in flaws)


def _as_finding(found: Found, error: CheckpointError, consumers: str) -> Finding:
    remedy = "convert the model again"
    if not isinstance(error, LayerError):
        what = str(error).removeprefix(f"{found.checkpoint.path}: ")
        return Finding("error", "unreadable-layer", "", what, consumers, remedy)
    hurts = f"{consumers}: {error.effect}" if error.effect else consumers
    return Finding("error", error.check, error.layer, error.what, hurts, remedy)


def _orphans(found: Found, used: Collection[str], consumer: str) -> Iterator[Finding]:
    """Tensors that look like parts of quantized layers and are none."""
    layers = {name.rpartition(".")[0] for name in used}
    bare: dict[str, str | None] = {}
    codes = {each.name: each for each in undeclared_codes(found.checkpoint) if len(each.spec.shape) == 2}
    for name in found.checkpoint:
        stem, _, leaf = name.rpartition(".")
        if name in used or bare.get(stem) is not None:
            continue
        if name in codes:
            yield _without_scale(found, codes[name], consumer)
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


def _without_scale(found: Found, codes: UndeclaredCodes, consumer: str) -> Finding:
    beside, dtype = " and ".join(codes.companions), DTYPE_NAMES[codes.spec.dtype]
    have = f"{beside}, which do not make a format with them" if beside else "no scale"
    if not consumer and beside and not found.block:
        return Finding(
            "error", "no-block", codes.stem,
            f"found {dtype} codes with {beside}, but no quantization_config that says what they are",
            "every runtime: takes codes for weights, or misses tensors", "restore config.json, or convert again",
        )  # fmt: skip
    if not consumer:  # weights cast to FP8 and nothing else are common, and run
        return Finding(
            "warning", "missing-companion", codes.stem, f"found {dtype} codes with {have}",
            "runtimes that do not take them for plain numbers", "keep the scales when renaming, or convert again",
        )  # fmt: skip
    return Finding(
        "error", "missing-companion", codes.stem, f"found {dtype} codes with {have}, expected scales",
        f"{consumer}: takes the codes for weights, or reports missing keys", "convert the model again",
    )  # fmt: skip


def _extra(found: Found, name: str, stem: str, *, is_quantized: bool, consumer: str) -> Finding:
    weight = found.checkpoint.get(f"{stem}.weight")
    if is_quantized or weight is None:
        what = "found a tensor that the layer's format does not have"
    else:
        what = f"found it beside a {DTYPE_NAMES[weight.dtype]} weight, which is not quantized"
    return Finding(
        "error", "extra-companion", name, f"{what}, expected none", _hurt_by_extra(consumer),
        "remove the tensor, or convert the model again",
    )  # fmt: skip


def _bare(stem: str, what: str, consumer: str) -> Finding:
    return Finding(
        "error", "extra-companion", stem, f"{what}, expected '{stem}{WEIGHT}' beside them", _hurt_by_extra(consumer),
        "give the weight its name, or convert the model again",
    )  # fmt: skip


def _hurt_by_extra(consumer: str) -> str:
    """The readers that suffer from a superfluous tensor, and how."""
    others = f"{consumer or 'strict loaders'}: a KeyError for some models (vLLM-Omni: Z-Image, FLUX.1), else skipped"
    return f"{OURS}: refuses the model; {others}"


def _missing(gap: Gap) -> Finding:
    remedy = f"rename '{gap.stray}'" if gap.stray else "download it again"
    return Finding(
        "error", "missing-tensor", gap.name, gap.reason,
        f"{OURS}, and whoever else is strict: refuses the model; others leave the tensor unset",
        f"{remedy}, or convert the model again",
    )  # fmt: skip
