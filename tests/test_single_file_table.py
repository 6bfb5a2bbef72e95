"""The table of single files in the page of its room holds what the script prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import single_file_table

from omni_convert.formats.families.table import find_family

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "convert" / "source" / "README.md"


def _page() -> tuple[dict[str, str], list[str]]:
    """Model → its line, and the reasons, in their order."""
    text = PAGE.read_text().partition("## Single files")[2].partition("\n## ")[0].splitlines()
    lines = {line.split("|")[1].strip(): line for line in text if line.startswith("| ")}
    reasons = [line.partition(". ")[2] for line in text if line[:1].isdigit()]
    return lines, reasons


def test_every_model_has_a_line() -> None:
    lines, reasons = _page()
    assert lines.keys() == {"model", *single_file_table.MODELS}
    numbers = {cell.strip(" ()") for line in lines.values() for cell in line.split("|") if "(" in cell}
    assert numbers == {str(number + 1) for number in range(len(reasons))}


@pytest.mark.parametrize("name", ["wan", "cosmos_3"])
def test_a_line_is_what_becomes_of_the_file(name: str, tmp_path: Path) -> None:
    lines, reasons = _page()
    assert (
        single_file_table.line_of(name, list(single_file_table.cells_of(name, tmp_path)), list(reasons)) == lines[name]
    )


def test_the_refusals_of_vllm_omni_are_those_of_the_families() -> None:
    lines, reasons = _page()
    for name, (kind, _) in single_file_table.MODELS.items():
        refusal = find_family(kind).refusal("vllm-omni", "fp8", "vllm-omni")
        cell = lines[name].split("|")[2].strip()
        assert cell == "right" if refusal is None else reasons[int(cell.strip("()")) - 1] == refusal.reason, name
