"""The page of models says what the tables of families say, and what vLLM-Omni's loaders did."""

from __future__ import annotations

import json

import models_page
import pytest

from omni_convert.formats.families.table import FAMILIES

VERSIONS = ["0.30.0", "0.32.0rc1"]


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    content: dict[str, dict[str, dict[str, dict[str, object]]]] = json.loads(models_page.RECORD.read_text())
    return content


def test_the_page_is_what_the_tables_say(record: object) -> None:
    page = models_page.PAGE.read_text()
    assert page == models_page.page(record), f"run `{models_page.COMMAND}`, and commit {models_page.PAGE.name}"
    assert all(f"\n## {family.name}\n" in page for family in FAMILIES)


def test_every_cell_of_the_record_has_an_error_or_a_reason(
    record: dict[str, dict[str, dict[str, dict[str, object]]]],
) -> None:
    assert list(record) == VERSIONS
    grids = [{name: list(cells) for name, cells in models.items()} for models in record.values()]
    assert grids[0] == grids[1]
    for models in record.values():
        for cells in models.values():
            for result in cells.values():
                assert result.keys() in ({"layers", "error"}, {"refused"}, {"missing"}, {"failed"})
