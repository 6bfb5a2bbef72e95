"""The README's commands and Python lines do what they say: run on the demo pipeline, in order, in one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from omni_convert.convert.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|console|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
# Commands for another program, or of the development of this one: nothing here can say whether they work.
FOREIGN = ("pip ", "git ", "vllm ", "ray ", "./scripts/", "cd ")
# Models on the Hub, and places that only a cluster has.
ELSEWHERE = re.compile(r"\b(Tongyi-MAI|Qwen|black-forest-labs|Wan-AI)/|/shared/")


def commands(language: str, text: str) -> list[str]:
    """Shell commands of a block; in a console block they follow a `$` and the rest is output."""
    lines = text.replace("\\\n", " ").splitlines()
    if language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line and not line.startswith("#")]


SHELL_COMMANDS = [command for language, text in BLOCKS if language != "python" for command in commands(language, text)]


def test_the_readme_has_commands_and_python() -> None:
    assert len(SHELL_COMMANDS) >= 8
    assert {language for language, _ in BLOCKS} == {"bash", "console", "python"}


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


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "python"])
def test_python_lines_compile(text: str) -> None:
    assert compile(text, "README.md", "exec")


@pytest.mark.slow
def test_everything_runs_on_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    ran = 0
    for language, text in BLOCKS:
        if ELSEWHERE.search(text):
            continue
        if language == "python":
            exec(compile(text, "README.md", "exec"), namespace)
            ran += 1
            continue
        for command in commands(language, text):
            if command.startswith(FOREIGN):
                continue
            result = CliRunner().invoke(main, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}"
            ran += 1
    assert ran >= 10
    assert {"circle.png", "star.png", "report.json", "pictures"} <= {path.name for path in tmp_path.iterdir()}
