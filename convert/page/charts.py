"""Charts without a library: heat maps by block and role, and curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omni_convert.convert.page.html import Markup, element, joined

__all__ = ["Measure", "heat_map", "line_chart"]

BLOCK = re.compile(r"(?P<block>.*?\.\d+)\.(?P<role>.+)")
WIDTH, HEIGHT, MARGIN = 640, 300, 55


@dataclass(frozen=True)
class Measure:
    """A number for each layer.

    Attributes:
        shown: format of the numbers, as in `.2f`
    """

    name: str
    values: Mapping[str, float]
    shown: str = ".3g"


def heat_map(measures: Sequence[Measure]) -> Markup:
    """Layers by block and role, coloured by one of several measures, which buttons choose."""
    tables = [
        element("div", _table(measure), id=f"heat-{number}", class_="scroll", hidden=number > 0)
        for number, measure in enumerate(measures)
    ]
    buttons = [
        element(
            "button", measure.name, type="button", data_shows=f"heat-{number}", aria_pressed=str(not number).lower()
        )
        for number, measure in enumerate(measures)
    ]
    return joined((element("p", *buttons, class_="choices"), *tables))


def _table(measure: Measure) -> Markup:
    places = {layer: _place(layer) for layer in measure.values}
    blocks = sorted({block for block, _ in places.values()}, key=_natural)
    roles = sorted({role for _, role in places.values()}, key=_natural)
    by_place = {place: layer for layer, place in places.items()}
    low, high = min(measure.values.values(), default=0.0), max(measure.values.values(), default=0.0)

    def cell(block: str, role: str) -> Markup:
        layer = by_place.get((block, role))
        if layer is None:
            return element("td", class_="none")
        value = measure.values[layer]
        level = (value - low) / (high - low) if high > low else 0.0
        return element("td", format(value, measure.shown), style=f"--level:{level:.3f}", title=layer)

    head = element("tr", element("th", ""), *(element("th", role) for role in roles))
    rows = [element("tr", element("th", block), *(cell(block, role) for role in roles)) for block in blocks]
    return element("table", element("thead", head), element("tbody", *rows), class_="heat")


def _place(layer: str) -> tuple[str, str]:
    """Block and role of a layer: `transformer.layers.3` and `attention.to_q`."""
    match = BLOCK.match(layer)
    return (match["block"], match["role"]) if match else ("", layer)


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in a name count as such: block 10 comes after block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def line_chart(
    points: Sequence[tuple[float, float, str]],
    names: tuple[str, str],
    marked: Sequence[tuple[float, float, str]] = (),
) -> Markup:
    """A curve through points, each with a text that appears over it; some more points are marked.

    Args:
        names: what the axes show, across and up
    """
    everything = [*points, *marked]
    xs, ys = [x for x, _, _ in everything], [y for _, y, _ in everything]
    (left, right), (low, high) = (min(xs), max(xs)), (min(0.0, *ys), max(ys))

    def place(x: float, y: float) -> tuple[str, str]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return f"{MARGIN + across * (WIDTH - 2 * MARGIN):.1f}", f"{HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN):.1f}"

    path = " ".join(",".join(place(x, y)) for x, y, _ in points)
    dots = [_dot(*place(x, y), text, "dot", 2.5) for x, y, text in points]
    marks = [_dot(*place(x, y), text, "mark", 6) for x, y, text in marked]
    labels = [
        _text(MARGIN, HEIGHT - MARGIN + 18, f"{left:.4g}", "start"),
        _text(WIDTH - MARGIN, HEIGHT - MARGIN + 18, f"{right:.4g}", "end"),
        _text(WIDTH // 2, HEIGHT - 12, names[0], "middle"),
        _text(MARGIN - 6, HEIGHT - MARGIN, f"{low:.3g}", "end"),
        _text(MARGIN - 6, MARGIN, f"{high:.3g}", "end"),
        _text(MARGIN, MARGIN - 18, names[1], "start"),
    ]
    axes = [
        element("line", x1=MARGIN, y1=HEIGHT - MARGIN, x2=WIDTH - MARGIN, y2=HEIGHT - MARGIN, class_="axis"),
        element("line", x1=MARGIN, y1=MARGIN, x2=MARGIN, y2=HEIGHT - MARGIN, class_="axis"),
    ]
    curve = element("polyline", points=path, class_="curve")
    title = element("title", f"{names[1]} over {names[0]}")
    return element(
        "svg", title, *axes, *labels, curve, *dots, *marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, role="img"
    )


def _dot(x: str, y: str, text: str, kind: str, radius: float) -> Markup:
    return element("circle", element("title", text), cx=x, cy=y, r=radius, class_=kind)


def _text(x: int, y: int, text: str, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor)
