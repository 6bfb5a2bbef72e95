"""The parts of a page: text stays text, and everything is in the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from omni_convert.convert.page.charts import Measure, heat_map, line_chart, tile_chart
from omni_convert.convert.page.document import Section, facts, page, sortable_table
from omni_convert.convert.page.html import Markup, element, joined
from omni_convert.convert.page.pictures import picture_pair

#: Parses a page, see the fixture.
Read = Callable[[str], Any]

HOSTILE = (
    "<script>alert(1)</script>",
    '" onerror=alert(1) x="',
    "' onmouseover='alert(1)",
    "</title></style></script><img src=x onerror=alert(1)>",
    "&lt;b&gt; & \x00 \u202e",
    "javascript:alert(1)",
    "`${alert(1)}` --> ]]>",
)
SCRIPTS = 1


def whole_page(text: str) -> str:
    """A page that has a text wherever one can be."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    return page(
        text,
        [
            Section(text, facts({text: text})),
            Section("table", sortable_table([text, "n"], [[text, (1.0, text)]])),
            Section("heat", heat_map([Measure(text, {f"{text}.3.{text}": 1.0, text: 2.0})])),
            Section("chart", line_chart([(0, 1, text), (1, 2, text)], (text, text), [(1, 1, text)])),
            Section("pictures", picture_pair(pixels, pixels, text)),
        ],
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_text_never_becomes_markup(text: str, read: Read) -> None:
    plain, hostile = read(whole_page("plain")), read(whole_page(text))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == [sorted(a) for _, a in plain.tags]
    assert sum(tag == "script" for tag, _ in hostile.tags) == SCRIPTS
    assert hostile.text.count(text) == plain.text.count("plain")


def test_nothing_is_loaded(read: Read) -> None:
    tags = read(whole_page("plain")).tags
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "action"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:image/", "#")), (tag, address)
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"url\(|@import|fetch\(", whole_page("plain"))


def test_elements_escape_what_is_not_markup() -> None:
    assert element("b", "a < b", None, Markup("<i></i>"), title='"') == '<b title="&quot;">a &lt; b<i></i></b>'
    assert joined(["<", 1.5]) == "&lt;1.5"
    assert element("input", checked=True, hidden=False, data_x=1) == '<input checked data-x="1">'


def test_cells_have_numbers_as_the_script_of_the_page_reads_them(read: Read) -> None:
    rows = [[(float("inf"), "equal")], [(48.25, "48.2")], [3]]
    cells = [attributes for tag, attributes in read(sortable_table(["PSNR dB"], rows)).tags if tag == "td"]
    assert [attributes["data-value"] for attributes in cells] == ["Infinity", "48.25", "3"]


def test_a_heat_map_has_a_row_for_each_block(read: Read) -> None:
    values = {f"layers.{block}.{role}": float(block) for block in range(3) for role in ("q", "k")}
    cells = read(heat_map([Measure("error", values), Measure("bits", values)])).tags
    assert sum(tag == "td" for tag, _ in cells) == 2 * 6
    assert [a["style"] for t, a in cells if t == "td"][:4] == ["--level:0.000"] * 2 + ["--level:0.500"] * 2


def test_errors_that_are_nearly_equal_look_so(read: Read) -> None:
    cells = read(heat_map([Measure("error", {"layers.0.q": 0.0264, "layers.1.q": 0.0266})])).tags
    assert [a["style"] for t, a in cells if t == "td"] == ["--level:0.992", "--level:1.000"]


def test_pictures_are_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
    assert len(picture_pair(noise, noise[::-1], "large")) < 600_000


@pytest.mark.parametrize("text", HOSTILE)
def test_a_picture_of_a_card_is_sound_xml(text: str) -> None:
    curve = line_chart([(0, 1, text), (1, 2, text)], (text, text), [(1, 1, text)], is_file=True)
    for picture in (curve, tile_chart(text, {f"{text}.3.{text}": (0.5, text), text: (1.0, "nvfp4")})):
        root = ET.fromstring(picture)
        kinds = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
        assert kinds <= {"svg", "style", "title", "rect", "line", "text", "polyline", "circle", "g"}
        names = {name for element in root.iter() for name in element.attrib}
        assert not any(name.startswith("on") or name.endswith("href") for name in names)
