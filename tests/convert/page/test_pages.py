"""The report of every command, on a real (tiny) pipeline: one file, with what the command found."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from omni_convert.convert.cli.main import main

PROMPT = "</title></style></script><img src=x onerror=alert(1)>"
#: Parses a page, see the fixture.
Read = Callable[[str], Any]


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def opened(read: Read) -> Callable[[Path], Any]:
    """A function that gives the parts of a report, which is one small file without anything to load."""
    return partial(parts_of, read)


def parts_of(read: Read, path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    reader = read(text)
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert all(a.get("src", "data:") == "data:" or str(a["src"]).startswith("data:") for _, a in reader.tags)
    return reader


@pytest.fixture(scope="module")
def analyzed(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `analyze` left its files."""
    folder = tmp_path_factory.mktemp("analyzed")
    (folder / "prompts.txt").write_text(PROMPT)
    output = run(
        "analyze", tiny_pipeline_folder, "--calib", folder / "prompts.txt", "-o", folder / "table.json",
        "--report", folder / "analysis.html",
    )  # fmt: skip
    assert "most of the error: " in output
    for name in ("smaller", "knee", "better"):
        assert f"{name:<8} --target-size" in output
    return folder


def test_an_analysis(analyzed: Path, opened: Callable[[Path], Any]) -> None:
    reader = opened(analyzed / "analysis.html")
    table = json.loads((analyzed / "table.json").read_text())
    rows = sum(len(unit["options"]) for unit in table["units"])
    assert sum(tag == "td" and "data-value" in a for tag, a in reader.tags) == 2 * rows + 2 * 3
    assert "transformer.layers.1.attention.to_qkv" in reader.text
    assert (analyzed / "table.safetensors").exists()
    assert "nvfp4,fp8,bf16" in reader.text


def test_a_conversion_to_a_budget_and_its_verification(
    analyzed: Path, tiny_pipeline_folder: Path, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    run(
        "convert", tiny_pipeline_folder, "--calibration", analyzed / "table.safetensors", "--analysis",
        analyzed / "table.json", "--target-bits", "6", "-o", tmp_path / "out", "--report", tmp_path / "out.html",
    )  # fmt: skip
    reader = opened(tmp_path / "out.html")
    assert "Size and noise" in reader.text
    assert "nvfp4" in reader.text
    assert "bits per weight" in reader.text
    assert "4.50" in reader.text
    assert "largest input over the steps" in reader.text
    assert sum(tag == "circle" and a["class"] == "mark" for tag, a in reader.tags) == 1
    run("verify", tmp_path / "out", "--reference", tiny_pipeline_folder, "--report", tmp_path / "verify.html")
    assert "Nothing wrong." in opened(tmp_path / "verify.html").text
    config = tmp_path / "out" / "transformer" / "config.json"
    block = json.loads(config.read_text())
    block["quantization_config"]["quantized_layers"][PROMPT] = {"quant_algo": "FP8"}
    block["quantization_config"]["quantized_layers"].pop("layers.1.attention.to_qkv", None)
    name = next(
        name for name, entry in block["quantization_config"]["quantized_layers"].items() if "group" in str(entry)
    )
    block["quantization_config"]["quantized_layers"][name]["quant_algo"] = "FP8"
    config.write_text(json.dumps(block))
    run("verify", tmp_path / "out", "--report", tmp_path / "wrong.html", status=1)
    assert "block-mismatch" in opened(tmp_path / "wrong.html").text


def test_a_comparison(tiny_pipeline_folder: Path, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    run(
        "compare", "--model", tiny_pipeline_folder, "--candidate-quantization", "fp8", "--prompt", PROMPT, "--prompt",
        "a ring", "--output-json", tmp_path / "report.json", "--report", tmp_path / "report.html",
    )  # fmt: skip
    trajectory = json.loads((tmp_path / "report.json").read_text())["trajectory_metrics"]
    steps = trajectory["per_prompt_relative_l2_per_step"]
    assert [len(each) for each in steps] == [2, 2]
    assert all(value > 0 for each in steps for value in each)
    assert trajectory["mean_relative_l2_per_step"] == pytest.approx(
        [sum(pair) / 2 for pair in zip(*steps, strict=True)]
    )
    reader = opened(tmp_path / "report.html")
    assert sum(tag == "img" for tag, _ in reader.tags) == 2 * 3
    assert reader.text.count(PROMPT) >= 2
    assert "Distance of the latents" in reader.text
    assert "step 2" in reader.text
    assert f"{steps[1][0]:.4f}" in reader.text
