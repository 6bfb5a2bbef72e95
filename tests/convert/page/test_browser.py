"""Pages in a real browser: they render without errors, in light and dark, and what can be clicked works.

They need `playwright` and Debian's `chromium`; `scripts/nightly` says which is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from omni_convert.convert.page.charts import Measure, heat_map, line_chart
from omni_convert.convert.page.document import Section, page, sortable_table
from omni_convert.convert.page.html import joined
from omni_convert.convert.page.pictures import picture_pair

pytestmark = pytest.mark.slow

HOSTILE = "</title><img src=x onerror='document.title=1'><script>document.title=1</script>\"'`${1}"


@pytest.fixture(scope="module")
def browser(import_peer: Callable[[str], ModuleType]) -> Iterator[Any]:
    playwright = import_peer("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        give_up = pytest.fail if os.environ.get("OMNI_CONVERT_REQUIRE_PEERS") else pytest.skip
        give_up("chromium is not installed; apt-get install chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(params=["light", "dark"])
def opened(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page of every part, opened from disk, and what the browser complained about."""
    path = tmp_path / "report.html"
    path.write_text(whole_page(), encoding="utf-8")
    context = browser.new_context(color_scheme=request.param, viewport={"width": 900, "height": 1400}, offline=True)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda sent: complaints.append(sent.url) if sent.url.startswith("http") else None)
    tab.goto(path.as_uri())
    yield tab
    folder = os.environ.get("OMNI_CONVERT_SCREENSHOTS")
    if folder:
        tab.screenshot(path=Path(folder) / f"{request.param}-{request.node.originalname}.png", full_page=True)
    assert complaints == []
    context.close()


def whole_page() -> str:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (64, 64, 3), np.uint8)
    values = {f"layers.{block}.{role}": float(generator.random()) for block in range(4) for role in ("q", "k", "up")}
    curve = [(x, 8.0 / (x + 1), f"{x} MB") for x in range(10)]
    rows = [(name, (value, f"{value:.2f}"), HOSTILE) for name, value in values.items()]
    measures = [Measure("error", values, ".2f"), Measure("bits", {name: 8 * v for name, v in values.items()}, ".1f")]
    return page(
        HOSTILE,
        [
            Section("Layers", joined((heat_map(measures), sortable_table(["layer", "error", "note"], rows)))),
            Section("More layers", heat_map(measures)),
            Section("Curve", line_chart(curve, ("MB", "noise"), [(3, 2.0, HOSTILE)])),
            Section("Pictures", picture_pair(pixels, np.roll(pixels, 3, 1), HOSTILE)),
        ],
    )


def test_it_renders_and_its_text_is_text(opened: Any) -> None:
    assert opened.title() == HOSTILE
    assert opened.locator("h1").inner_text() == HOSTILE
    assert opened.locator("figcaption").inner_text() == HOSTILE
    for image in opened.locator("img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth") == 64
    paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = opened.evaluate("getComputedStyle(document.body).color")
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (brightness(paper) < brightness(ink)) == dark
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def brightness(color: str) -> int:
    return sum(int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(","))


def test_tables_are_sorted_by_their_columns(opened: Any) -> None:
    def column() -> list[float]:
        return [float(text) for text in opened.locator("table.sortable tbody td:nth-child(2)").all_inner_texts()]

    head = opened.locator("table.sortable th:nth-child(2) button")
    assert column() != sorted(column())
    head.click()
    assert column() == sorted(column(), reverse=True)
    head.click()
    assert column() == sorted(column())
    assert opened.locator("th[aria-sort=ascending]").inner_text().startswith("error")


def test_buttons_choose_the_measure(opened: Any) -> None:
    first, second = opened.locator(".heats").all()
    assert visible_tables(first) == visible_tables(second) == [True, False]
    first.get_by_role("button", name="bits").click()
    assert visible_tables(first) == [False, True]
    assert visible_tables(second) == [True, False], "each map has buttons of its own"


def visible_tables(heats: Any) -> list[bool]:
    return [table.is_visible() for table in heats.locator(".scroll").all()]


def test_the_slider_uncovers_the_reference(opened: Any) -> None:
    over = opened.locator(".over")
    assert "50%" in over.evaluate("image => getComputedStyle(image).clipPath")
    opened.locator("input[type=range]").fill("80")
    assert "80%" in over.evaluate("image => getComputedStyle(image).clipPath")
    assert not opened.locator(".apart").is_visible()
    opened.get_by_label("difference").check()
    assert opened.locator(".apart").is_visible()
    assert not over.is_visible()
