"""Charts without a library: heat maps by block and role, and curves.

Each curve and each map of tiles is an SVG: part of a page, or a file of its own, as model cards need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from omni_convert.convert.page.html import Markup, element

__all__ = ["Measure", "heat_map", "line_chart", "tile_chart"]

BLOCK = re.compile(r"(?P<block>.*?\.\d+)\.(?P<role>.+)")
WIDTH, HEIGHT, MARGIN = 640, 300, 55
#: Sizes of the map of tiles: a tile, the names of blocks beside it, and a letter.
TILE_WIDTH, TILE_HEIGHT, BLOCK_WIDTH, LETTER = 132, 24, 190, 6.6
#: A file is shown on a ground that it does not know: it brings its own.
FILE_STYLE = """
svg { font: 12px sans-serif; } text { fill: #1c2430; } .paper { fill: #fff; } .axis { stroke: #cfd6df; }
.curve { fill: none; stroke: #1c2430; stroke-width: 2; } .dot { fill: #1c2430; } .mark, .tile { fill: #c2410c; }
"""
#: What XML cannot hold, not even escaped.
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Measure:
    """A number for each layer, zero or above.

    Attributes:
        shown: format of the numbers, as in `.2f`
    """

    name: str
    values: Mapping[str, float]
    shown: str = ".3g"


def heat_map(measures: Sequence[Measure]) -> Markup:
    """Layers by block and role, coloured by one of several measures, which buttons choose."""
    tables = [
        element("div", _table(measure), class_="scroll", hidden=number > 0) for number, measure in enumerate(measures)
    ]
    buttons = [
        element("button", measure.name, type="button", aria_pressed=str(not number).lower())
        for number, measure in enumerate(measures)
    ]
    return element("div", element("p", *buttons, class_="choices"), *tables, class_="heats")


def _table(measure: Measure) -> Markup:
    blocks, roles, by_place = _grid(measure.values)
    highest = max(measure.values.values(), default=0.0)

    def cell(block: str, role: str) -> Markup:
        layer = by_place.get((block, role))
        if layer is None:
            return element("td", class_="none")
        value = measure.values[layer]
        level = value / highest if highest > 0 else 0.0
        return element("td", format(value, measure.shown), style=f"--level:{level:.3f}", title=layer)

    head = element("tr", element("th", ""), *(_heading(role) for role in roles))
    rows = [element("tr", _heading(block), *(cell(block, role) for role in roles)) for block in blocks]
    return element("table", element("thead", head), element("tbody", *rows), class_="heat")


def _heading(name: str) -> Markup:
    """A name of layers, which may go on in a new line at each dot."""
    first, *others = name.split(".")
    return element("th", first, *(part for each in others for part in (element("wbr"), f".{each}")))


def _grid(layers: Iterable[str]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """The blocks and the roles of layers in their order, and the layer of each block and role."""
    by_place = {_place(layer): layer for layer in layers}
    blocks, roles = (sorted({place[part] for place in by_place}, key=_natural) for part in (0, 1))
    return blocks, roles, by_place


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
    *,
    is_file: bool = False,
) -> Markup:
    """A curve through points, each with a text that appears over it; some more points are marked.

    Args:
        names: what the axes show, across and up
        is_file: it stands in a file of its own
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
    title = f"{names[1]} over {names[0]}"
    return _svg((WIDTH, HEIGHT), title, [*axes, *labels, curve, *dots, *marks], is_file=is_file)


def tile_chart(title: str, tiles: Mapping[str, tuple[float, str]]) -> Markup:
    """A file with a tile for each layer, by block and role.

    Args:
        tiles: layer → how strong its colour is, from 0 to 1, and the text on it
    """
    blocks, roles, by_place = _grid(tiles)
    heads = [
        _text(_middle(column), TILE_HEIGHT - 8, _cut(role, TILE_WIDTH), "middle") for column, role in enumerate(roles)
    ]
    rows = [
        _text(BLOCK_WIDTH - 8, row * TILE_HEIGHT - 8, _cut(block, BLOCK_WIDTH), "end")
        for row, block in enumerate(blocks, start=2)
    ]
    shown = [
        _tile(row, column, layer, *tiles[layer])
        for row, block in enumerate(blocks, start=1)
        for column, role in enumerate(roles)
        if (layer := by_place.get((block, role))) is not None
    ]
    size = BLOCK_WIDTH + TILE_WIDTH * len(roles), TILE_HEIGHT * (len(blocks) + 1)
    return _svg(size, title, [*heads, *rows, *shown], is_file=True)


def _tile(row: int, column: int, layer: str, strength: float, text: str) -> Markup:
    place = {"x": BLOCK_WIDTH + column * TILE_WIDTH + 1, "y": row * TILE_HEIGHT + 1}
    box = element(
        "rect", **place, width=TILE_WIDTH - 2, height=TILE_HEIGHT - 2, class_="tile", fill_opacity=f"{strength:.3f}"
    )
    label = _text(_middle(column), (row + 1) * TILE_HEIGHT - 8, _cut(text, TILE_WIDTH), "middle")
    return element("g", element("title", layer), box, label)


def _middle(column: int) -> int:
    return BLOCK_WIDTH + column * TILE_WIDTH + TILE_WIDTH // 2


def _cut(text: str, width: int) -> str:
    """The end of a text, as much of it as a width holds."""
    fitting = int(width / LETTER) - 1
    return text if len(text) <= fitting else f"…{text[1 - fitting :]}"


def _svg(size: tuple[int, int], title: str, content: Sequence[Markup], *, is_file: bool) -> Markup:
    ground = (element("style", Markup(FILE_STYLE)), element("rect", width="100%", height="100%", class_="paper"))
    whole = element(
        "svg",
        element("title", title),
        *(ground if is_file else ()),
        *content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {size[0]} {size[1]}",
        width=size[0],
        role="img",
    )
    return Markup(NOT_IN_XML.sub("\ufffd", whole)) if is_file else whole


def _dot(x: str, y: str, text: str, kind: str, radius: float) -> Markup:
    return element("circle", element("title", text), cx=x, cy=y, r=radius, class_=kind)


def _text(x: int, y: int, text: str, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor)
