"""The frame of a report: one file that needs no network, in light and dark, with a table of contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omni_convert.convert.page.html import Content, Markup, element, joined
from omni_convert.formats.errors import OutputError

__all__ = ["Section", "facts", "page", "sortable_table", "write_page"]

# Nothing may be loaded: pictures are in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #eef1f5; --line: #cfd6df; --mark: #c2410c;
  --note: #5b6675; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --soft: #222933; --line: #3a4451;
  --mark: #fb923c; --note: #9aa6b5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
nav a { margin-right: 1rem; }
a { color: inherit; }
p, li { max-width: 75ch; }
.note { color: var(--note); }
.scroll { overflow: auto; max-height: 34rem; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sortable th { position: sticky; top: 0; background: var(--soft); }
.sortable th button { all: unset; cursor: pointer; font-weight: 600; }
.sortable th button:focus-visible { outline: 2px solid var(--mark); }
.sortable th[aria-sort=ascending] button::after { content: " \\2191"; }
.sortable th[aria-sort=descending] button::after { content: " \\2193"; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--note); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .7rem; overflow: auto; }
.choices button { font: inherit; padding: .2rem .7rem; border: 1px solid var(--line); background: var(--paper);
  color: var(--ink); cursor: pointer; }
.choices button[aria-pressed=true] { background: var(--ink); color: var(--paper); }
.heat td { text-align: center; min-width: 3.6rem; font-variant-numeric: tabular-nums; border: 1px solid var(--paper);
  background: color-mix(in srgb, var(--mark) calc(var(--level) * 70%), var(--soft)); }
.heat th { overflow-wrap: break-word; }
.heat td.none { background: none; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .axis { stroke: var(--line); } svg .curve { fill: none; stroke: var(--ink); stroke-width: 2; }
svg .dot { fill: var(--ink); } svg .mark { fill: var(--mark); }
.pair { display: inline-block; margin: 0 1rem 1.5rem 0; vertical-align: top; max-width: 100%; }
.pair .stage { position: relative; width: 20rem; max-width: 100%; }
.pair img { display: block; width: 100%; image-rendering: pixelated; }
.pair .over { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--cut, 50%)); }
.pair.difference .over, .pair:not(.difference) .apart { display: none; }
.pair .apart { position: absolute; inset: 0; }
.pair input[type=range] { display: block; width: 20rem; max-width: 100%; }
.pair figcaption { width: 20rem; max-width: 100%; overflow-wrap: anywhere; }
figure { margin: 0; }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") !== "descending";
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)], difference = Number(x) - Number(y);
      return Number.isNaN(difference) ? x.localeCompare(y) : difference;
    };
    const body = table.tBodies[0], rows = [...body.rows].sort(compare);
    body.append(...(descending ? rows.reverse() : rows));
    table.querySelectorAll("th").forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }));
}
for (const heats of document.querySelectorAll(".heats")) {
  const buttons = [...heats.querySelectorAll(".choices button")], tables = [...heats.querySelectorAll(".scroll")];
  const show = chosen => buttons.forEach((button, number) => {
    button.setAttribute("aria-pressed", number === chosen);
    tables[number].hidden = number !== chosen;
  });
  buttons.forEach((button, number) => button.addEventListener("click", () => show(number)));
  show(0);
}
for (const pair of document.querySelectorAll(".pair")) {
  pair.querySelector("input[type=range]").addEventListener("input", event =>
    pair.querySelector(".over").style.setProperty("--cut", event.target.value + "%"));
  pair.querySelector("input[type=checkbox]").addEventListener("change", event =>
    pair.classList.toggle("difference", event.target.checked));
}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    content: Markup


def page(title: str, sections: Sequence[Section]) -> str:
    """The document."""
    contents = [
        element("a", section.title, href=f"#part-{number}") for number, section in enumerate(sections) if section.title
    ]
    parts = [
        element("section", element("h2", section.title, id=f"part-{number}"), section.content)
        for number, section in enumerate(sections)
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = element("body", element("h1", title), element("nav", *contents), *parts, element("script", Markup(SCRIPT)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def write_page(path: Path, text: str) -> None:
    """Writes a page; raises OutputError if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def facts(rows: dict[str, Content]) -> Markup:
    """Names and values; those without a value are left out."""
    shown = [(name, value) for name, value in rows.items() if value not in (None, "")]
    return element("dl", *(joined((element("dt", name), element("dd", value))) for name, value in shown))


def sortable_table(heads: Sequence[str], rows: Sequence[Sequence[Content | tuple[float, str]]]) -> Markup:
    """A table whose columns sort it.

    Args:
        rows: cells; a number with its text is sorted by the number
    """
    is_number = [bool(rows) and isinstance(cell, tuple | float | int) for cell in (rows[0] if rows else heads)]
    head = [
        element("th", element("button", name, type="button"), class_="number" if number else None)
        for name, number in zip(heads, is_number, strict=True)
    ]
    body = [element("tr", *(_cell(cell) for cell in row)) for row in rows]
    table = element("table", element("thead", element("tr", *head)), element("tbody", *body), class_="sortable")
    return element("div", table, class_="scroll")


def _cell(cell: Content | tuple[float, str]) -> Markup:
    if isinstance(cell, float | int):
        cell = cell, f"{cell:g}"
    if isinstance(cell, tuple):
        value, text = cell
        return element("td", text, class_="number", data_value=repr(value).replace("inf", "Infinity"))  # as in scripts
    return element("td", cell)
