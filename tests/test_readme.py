"""The commands and Python lines of all pages do what they say: run on the demo pipeline, in order, in one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from omni_convert.convert.cli.main import main
from omni_convert.convert.recipe import METHODS
from omni_convert.convert.source.location import DEMO_PROMPTS
from omni_convert.formats.dialects.table import WRITTEN
from omni_convert.formats.families.table import FAMILIES

ROOT = Path(__file__).parent.parent
# README.md first: the other pages use what its commands make.
FIRST = ("README.md", "convert/README.md", "formats/README.md", "loaders/README.md", "scripts/README.md")
ROOMS = sorted(path for layer in ("convert", "formats", "loaders") for path in (ROOT / layer).rglob("*/README.md"))
PAGES = [*(ROOT / name for name in (*FIRST, "CONTRIBUTING.md")), *ROOMS]
# Commands for another program, or of the development of this one: nothing here can say whether they work.
FOREIGN = ("pip ", "git ", "vllm ", "ray ", "./scripts/", "cd ")
# Models on the Hub, and places that only a cluster has.
ELSEWHERE = re.compile(r"\b(Tongyi-MAI|Qwen|black-forest-labs|Wan-AI)/|/shared/")
#: What the other pages calibrate on; README.md, on all prompts of the demo.
FEW_PROMPTS = "\n".join(DEMO_PROMPTS.read_text().splitlines()[:4])
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
FENCED = re.compile(r"^```(bash|console|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: str
    language: str
    text: str


BLOCKS = [Block(str(page.relative_to(ROOT)), *found) for page in PAGES for found in FENCED.findall(page.read_text())]


def commands(language: str, text: str) -> list[str]:
    """Shell commands of a block; in a console block they follow a `$` and the rest is output."""
    lines = text.replace("\\\n", " ").splitlines()
    if language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line and not line.startswith("#")]


SHELL_COMMANDS = [
    command for block in BLOCKS if block.language != "python" for command in commands(block.language, block.text)
]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_have_commands_and_python() -> None:
    assert len(SHELL_COMMANDS) >= 20
    assert {block.language for block in BLOCKS if block.page == "README.md"} == {"bash", "console", "python"}


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        path = (page.parent / target) if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def listed_modules(page: Path) -> set[str]:
    """The names in a page's table columns that are headed `file`, `files` or `room`."""
    names: set[str] = set()
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
        header, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        for column, title in enumerate(header):
            if title.strip() in ("files", "room") or (title.strip() == "file" and page in ROOMS):
                names |= {
                    name for row in rows for name in re.findall(r"`([\w/]+)`", re.sub(r"\(.*?\)", "", row[column]))
                }
    return names


@pytest.mark.parametrize("page", [*PAGES[1:4], *ROOMS], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_modules_that_are_there(page: Path) -> None:
    missing = {name for name in listed_modules(page) if not (page.parent / name).with_suffix(".py").exists()}
    assert {name for name in missing if not (page.parent / name).is_dir()} == set()


def section(page: str, heading: str) -> str:
    """The text below a heading, to the next one."""
    return (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_tables_name_every_method_dialect_and_family() -> None:
    assert [name for name in METHODS if f"| `{name}` |" not in section("README.md", "Methods")] == []
    assert [name for name in WRITTEN if f"| `{name}`" not in section("formats/README.md", "Dialects")] == []
    tabulated = [family.name for family in FAMILIES if family.layers]
    assert [name for name in tabulated if name not in section("formats/README.md", "Models")] == []


@pytest.mark.parametrize("command", SHELL_COMMANDS)
def test_every_command_can_be_parsed(command: str) -> None:
    if command.startswith(FOREIGN):
        return
    program, *arguments = shlex.split(command)
    assert program == "omni-convert", command
    context = click.Context(main)
    name, found, rest = main.resolve_command(context, main.parse_args(context, list(arguments)) and list(arguments))
    assert found is not None
    found.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python"], ids=lambda block: block.page
)
def test_python_lines_compile(block: Block) -> None:
    assert compile(block.text, block.page, "exec")


@pytest.mark.slow
def test_everything_runs_on_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    ran = 0
    for page, language, text in BLOCKS:
        if page != FIRST[0]:
            (tmp_path / "prompts.txt").write_text(FEW_PROMPTS)
        if ELSEWHERE.search(text):
            continue
        if language == "python":
            exec(compile(text, page, "exec"), namespace)
            ran += 1
            continue
        for command in commands(language, text):
            if command.startswith(FOREIGN):
                continue
            result = CliRunner().invoke(main, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{page}: {command}\n{result.output}"
            ran += 1
    assert ran >= 20
    assert {"circle.png", "star.png", "report.json", "pictures"} <= {path.name for path in tmp_path.iterdir()}
