"""The findings of `verify`, as lines for a terminal or as JSON."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from omni_convert.convert.inspection.verification import VerifiedComponent
from omni_convert.convert.terminal import wrapped
from omni_convert.formats.errors import listed
from omni_convert.formats.finding import Finding

__all__ = ["count_of", "verification_report"]

# Names and numbers, which differ between layers with the same flaw.
PARTICULAR = re.compile(r"'[^']*'|[-+.\de]*\d")


def count_of(components: Sequence[VerifiedComponent], severity: str) -> int:
    """The number of findings of a severity."""
    return sum(finding.severity == severity for component in components for finding in component.findings)


def verification_report(path: Path, components: Sequence[VerifiedComponent], *, as_json: bool) -> Iterator[str]:
    """A list in which findings that differ only in the layer share an entry; or everything as one JSON document."""
    counts = {severity: count_of(components, severity) for severity in ("error", "warning")}
    if as_json:
        document = {
            "path": str(path),
            "errors": counts["error"],
            "warnings": counts["warning"],
            "components": [
                {**asdict(each), "errors": {stem: _number(error) for stem, error in each.errors.items()}}
                for each in components
            ],
        }
        yield json.dumps(document, indent=2, allow_nan=False)
        return
    for component in components:
        yield from _component_lines(component, path)
    unchecked = dict.fromkeys(what for component in components for what in component.unchecked)
    if unchecked:
        yield f"not checked without --reference MODEL: {', '.join(unchecked)}"
    yield ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items())


def _number(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _component_lines(component: VerifiedComponent, path: Path) -> Iterator[str]:
    sound = "" if component.findings else ", nothing wrong"
    yield f"{component.name or path.name}: {component.contents}{sound}"
    if component.errors:
        worst = max(component.errors, key=lambda stem: component.errors[stem])
        median = statistics.median(component.errors.values())
        yield f"  against the reference: median error {median:.2%}, worst {component.errors[worst]:.2%} ({worst})"
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for finding in component.findings:
        key: tuple[str, ...] = (finding.severity, finding.check, PARTICULAR.sub("", finding.what), finding.hurts)
        alike.setdefault(key, []).append(finding)
    for same in sorted(alike.values(), key=lambda same: same[0].severity):  # errors first
        yield from _finding_lines(same)


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    first = findings[0]
    where = f" {listed([finding.layer for finding in findings], 1)}" if first.layer else ""
    yield f"  {first.severity:<7} {first.check}{where}"
    for label, text in (("", first.what), ("hurts:  ", first.hurts), ("remedy: ", first.remedy)):
        if text:
            indent = " " * (10 + len(label))
            yield from wrapped(text, f"{label:>{len(indent)}}", indent)
