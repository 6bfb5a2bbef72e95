"""Reads a damaged checkpoint as far as it goes: the layers that can be read, and a finding for each that cannot."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from omni_convert.formats.checks.completeness import Gap, block_gaps
from omni_convert.formats.checks.meaning import doubts, strays
from omni_convert.formats.checks.tensors import check_layer
from omni_convert.formats.dialects.found import Found
from omni_convert.formats.dialects.verdict import OURS
from omni_convert.formats.finding import Finding
from omni_convert.formats.views.opened import QuantizedCheckpoint, read_layers

__all__ = ["TolerantReading", "read_tolerantly"]

# A layer with one of these has no values that could be checked.
BREAKING = ("silent-cast", "wrong-shape", "indivisible-width")


@dataclass(frozen=True)
class TolerantReading:
    """The readable part of a checkpoint.

    Attributes:
        quantized: the checkpoint, with the layers whose values can be checked
        shapes: stem to [out, in] of these and of the layers that are damaged but known
        findings: what is wrong with the rest
        is_unreadable: the dialect cannot read the component as a whole, so that names and other layers tell nothing
    """

    found: Found
    quantized: QuantizedCheckpoint
    shapes: dict[str, tuple[int, int]]
    findings: list[Finding]
    is_unreadable: bool = False


def read_tolerantly(found: Found) -> TolerantReading:
    """Reads headers, configs and tiny markers of a checkpoint, whatever is wrong with it."""
    reading = read_layers(found)
    dialect, quantized = reading.dialect, reading.quantized
    if reading.is_unreadable:
        return TolerantReading(found, quantized, {}, list(doubts(reading)), is_unreadable=True)
    findings = [*doubts(reading), *strays(reading)]
    if dialect is None:
        return TolerantReading(found, quantized, {}, findings)
    known = (*reading.layers.values(), *reading.damaged)
    flaws = {layer.stem: list(check_layer(layer, dialect.name)) for layer in known}
    findings += [flaw for each in flaws.values() for flaw in each]
    layers = {stem: layer for stem, layer in quantized.layers.items() if not _is_broken(flaws[stem])}
    shapes = {layer.stem: layer.shape for layer in known}
    damaged = {finding.layer for finding in findings if finding.check != "extra-companion"}
    findings += [_missing(gap) for gap in block_gaps(quantized, shapes) if gap.name.rpartition(".")[0] not in damaged]
    return TolerantReading(found, replace(quantized, layers=layers), shapes, findings)


def _is_broken(flaws: Collection[Finding]) -> bool:
    return any(flaw.severity == "error" and flaw.check in BREAKING for flaw in flaws)


def _missing(gap: Gap) -> Finding:
    remedy = f"rename '{gap.stray}'" if gap.stray else "download it again"
    return Finding(
        "error", "missing-tensor", gap.name, gap.reason,
        f"{OURS}, and whoever else is strict: refuses the model; others leave the tensor unset",
        f"{remedy}, or convert the model again",
    )  # fmt: skip
