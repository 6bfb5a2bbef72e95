"""Budgets on a real (tiny) pipeline: they are met, what is written is what was chosen, and misuse is named."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from omni_convert.convert.calibration.generation import GenerationSettings
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.comparison.comparison import Variant, run_variant
from omni_convert.convert.comparison.metrics import rmse
from omni_convert.convert.conversion import Conversion, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.inspection.verification_report import count_of
from omni_convert.convert.precision.analysis import Analysis, analyze
from omni_convert.convert.precision.mixture import mixture_of
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.errors import CalibrationError, OmniConvertError, RecipeError
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.loaders import kernel_report, load_pipeline


@pytest.fixture(scope="module")
def calibration(tiny_pipeline_folder: Path, record_sensitivity: Callable[[Path], Path]) -> Path:
    return record_sensitivity(tiny_pipeline_folder)


def convert(source: Path, output: Path, calibration: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config block of the transformer and its part of the manifest."""
    convert_checkpoint(source, output, Recipe(calibration=(calibration,), **options))
    block = json.loads((output / "transformer" / "config.json").read_text()).get("quantization_config", {})
    manifest = json.loads((output / "omni_convert.json").read_text())["components"]["transformer"]
    assert count_of(verify_source(resolve_source(output), None, lambda _: None), "error") == 0
    return block, manifest


def weight_bytes(output: Path) -> int:
    return sum(file.stat().st_size for file in (output / "transformer").iterdir() if file.suffix != ".json")


def test_a_mixture_of_modelopt(tiny_pipeline_folder: Path, calibration: Path, tmp_path: Path) -> None:
    limit = 3_000_000
    block, manifest = convert(tiny_pipeline_folder, tmp_path / "out", calibration, target_size=f"{limit}B")
    assert limit * 0.97 < weight_bytes(tmp_path / "out") <= limit
    assert block["quant_algo"] == "MIXED_PRECISION"
    labels = {layer["format"] for layer in manifest["layers"].values()}
    assert labels == {"nvfp4", "fp8 static"}
    algorithms = {name: entry["quant_algo"] for name, entry in block["quantized_layers"].items()}
    for name, layer in manifest["layers"].items():
        assert algorithms[name] == ("NVFP4" if layer["format"] == "nvfp4" else "FP8")
    # Readers look merged layers up by the runtime's names, and all of their parts have one format.
    assert algorithms["layers.0.attention.to_qkv"] == algorithms["layers.0.attention.to_v"]
    assert algorithms["layers.0.feed_forward.w13"] == algorithms["layers.0.feed_forward.w3"]
    card = (tmp_path / "out" / "README.md").read_text()
    counts = Counter(layer["format"] for layer in manifest["layers"].values())
    assert f"**{counts['fp8 static']} fp8 static, {counts['nvfp4']} nvfp4**, mixed for `--target-size" in card
    assert "vllm serve" in card
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card):
        assert ET.parse(tmp_path / "out" / name).getroot().tag.endswith("svg")
        assert name in json.loads((tmp_path / "out" / "omni_convert.json").read_text())["files"]
    assert card.count("![") == 2
    pipe = load_pipeline(tmp_path / "out", "cpu")
    loaded = {layer.name: layer.format for layer in kernel_report(pipe).layers}
    assert loaded == {f"transformer.{name}": layer["format"] for name, layer in manifest["layers"].items()}


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"method": "mxfp4", "target_bits": 10.0}, ("mxfp4",)),
        ({"method": "gguf", "target_bits": 5.0}, ("gguf Q4_K", "gguf Q5_0")),
        ({"dialect": "comfyui", "target_bits": 7.0}, ("fp8 static", "nvfp4")),
        ({"dialect": "compressed-tensors", "target_speed": 0.4}, ("fp8 static", "nvfp4")),
        ({"formats": ("int8", "bf16"), "target_bits": 10.0}, ("int8",)),
    ],
    ids=str,
)
def test_every_dialect_mixes_what_its_readers_take(
    options: dict[str, Any], labels: tuple[str, ...], tiny_pipeline_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    _, manifest = convert(tiny_pipeline_folder, tmp_path / "out", calibration, **options)
    found = {layer["format"] for layer in manifest["layers"].values()}
    assert found == set(labels) or (found > set(labels) and options.get("method") == "gguf")
    if len(labels) == 1:
        assert any("BF16 by --target-bits" in reason for reason in manifest["kept"].values())


def test_the_same_job_gives_the_same_bytes(tiny_pipeline_folder: Path, calibration: Path, tmp_path: Path) -> None:
    manifests = []
    for name in ("first", "second"):
        convert(tiny_pipeline_folder, tmp_path / name, calibration, target_noise=30.0)
        manifests.append((tmp_path / name / "omni_convert.json").read_bytes())
    assert manifests[0] == manifests[1]


@pytest.fixture(scope="module")
def analysis(tiny_pipeline_folder: Path, calibration: Path) -> Analysis:
    recipe = Recipe(calibration=(calibration,))
    return analyze(resolve_source(tiny_pipeline_folder), recipe, Statistics.load(calibration))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": "1kB"}, r"--target-size 1kB: found no choice below \S+MB, which is the nearest"),
        ({"target_noise": 0.5}, "--target-noise 0.5: found no choice below 1, which is the nearest"),
        ({"target_bits": 2.0}, "--target-bits 2.0: found no choice below 4.5, which is the nearest"),
        ({"target_speed": 0.1}, "--target-speed 0.1: found no choice below 0.25, which is the nearest"),
        ({"target_bits": 16.0}, "every layer has to stay"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_met_names_the_nearest(
    options: dict[str, Any], message: str, analysis: Analysis, tiny_pipeline_folder: Path, calibration: Path
) -> None:
    recipe = Recipe(calibration=(calibration,), **options)
    with pytest.raises(RecipeError, match=message):
        mixture_of(resolve_source(tiny_pipeline_folder), recipe, analysis)


def test_the_nearest_size_can_be_had(analysis: Analysis, tiny_pipeline_folder: Path, calibration: Path) -> None:
    source, recipe = resolve_source(tiny_pipeline_folder), Recipe(calibration=(calibration,), target_size="1kB")
    with pytest.raises(RecipeError) as error:
        mixture_of(source, recipe, analysis)
    nearest = str(error.value).partition("below ")[2].partition(",")[0]
    point = mixture_of(source, replace(recipe, target_size=nearest), analysis).point
    assert {option.name for option in point.chosen} == {"nvfp4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 5.0}, "--target-bits 5.0: found no statistics"),
        ({"formats": ("nvfp4", "bf16")}, "--formats: found without a budget"),
        ({"analysis": Path("table.json")}, "--analysis: found without a budget"),
        ({"trial": Path("prompts.txt")}, "--trial: found without a budget"),
        ({"method": "keep", "target_bits": 5.0}, "found with -m keep"),
    ],
    ids=str,
)
def test_what_a_budget_needs(options: dict[str, Any], message: str, tiny_pipeline_folder: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        Conversion.prepare(tiny_pipeline_folder, None, Recipe(**options))
    with pytest.raises(RecipeError, match=message):  # before anything is downloaded
        Conversion.prepare("nobody/nothing", None, Recipe(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 5.0, "target_noise": 2.0}, "--target-bits: found with --target-noise"),
        ({"target_size": "12 apples"}, "--target-size: found '12 apples'"),
        ({"target_noise": -1.0}, "--target-noise: found -1.0"),
        ({"target_bits": 5.0, "formats": ("nvfp5",)}, "--formats: found 'nvfp5'.*did you mean 'nvfp4'"),
        ({"target_bits": 5.0, "formats": ("bf16",)}, "--formats: found bf16 alone"),
        ({"target_bits": 5.0, "formats": ("mxfp4", "int8")}, "--formats: found mxfp4 beside others"),
        ({"target_bits": 5.0, "method": "int8", "formats": ("fp8",)}, "--formats: found fp8 with method 'int8'"),
        ({"target_bits": 5.0, "method": "gguf", "formats": ("Q9_K",)}, "--formats: found 'Q9_K'"),
    ],
    ids=str,
)
def test_a_budget_that_is_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**options)


def test_statistics_without_sensitivity_are_not_enough(
    tiny_pipeline_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    statistics = replace(Statistics.load(calibration), sensitivity=None)
    statistics.save(tmp_path / "plain.safetensors")
    recipe = Recipe(calibration=(tmp_path / "plain.safetensors",), target_bits=5.0)
    with pytest.raises(CalibrationError, match=r"found no sensitivity of layers.*calibrate --sensitivity"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)


def test_an_analysis_is_stored_and_reused(
    analysis: Analysis, tiny_pipeline_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    stored = tmp_path / "analysis.json"
    stored.write_text(json.dumps(analysis.to_json()))
    assert Analysis.load(stored) == analysis
    with_table, _ = convert(tiny_pipeline_folder, tmp_path / "a", calibration, target_bits=6.0, analysis=stored)
    without, _ = convert(tiny_pipeline_folder, tmp_path / "b", calibration, target_bits=6.0)
    assert with_table == without
    other = Recipe(calibration=(calibration,), target_bits=6.0, analysis=stored, formats=("nvfp4", "bf16"))
    with pytest.raises(RecipeError, match="other options"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "c", other)
    stored.write_text("{}")
    with pytest.raises(OmniConvertError, match="damaged analysis"):
        Analysis.load(stored)


@pytest.mark.parametrize("options", [{"target_size": "3MB"}, {"method": "gguf", "target_bits": 5.0}], ids=str)
def test_a_trial_takes_the_choice_that_changes_images_least(
    options: dict[str, Any], tiny_pipeline_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a blue square")
    recipe = Recipe(calibration=(calibration,), trial=tmp_path / "prompts.txt", **options)
    conversion = Conversion.prepare(tiny_pipeline_folder, tmp_path / "out", recipe)
    mixture = conversion.mixture
    assert mixture is not None
    assert len(mixture.trial) > 2
    assert any("RMSE of the choices that were tried: " in note for note in conversion.plan.notes)
    conversion.execute(lambda _: None)
    base, settings = Variant("base", str(tiny_pipeline_folder)), GenerationSettings.for_pipeline(tiny_pipeline_folder)
    reference, found = (
        run_variant(replace(base, model=str(folder)), [Prompt("a blue square")], settings, 0).images
        for folder in (tiny_pipeline_folder, tmp_path / "out")
    )
    assert rmse(reference, found) == min(mixture.trial.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]
    again = Conversion.prepare(tiny_pipeline_folder, tmp_path / "again", recipe)
    assert again.mixture is not None
    assert (again.mixture.trial, again.mixture.point) == (mixture.trial, mixture.point)


def test_a_trial_needs_prompts(tiny_pipeline_folder: Path, calibration: Path, tmp_path: Path) -> None:
    recipe = Recipe(calibration=(calibration,), trial=tmp_path / "none.txt", target_bits=6.0)
    with pytest.raises(CalibrationError, match=r"none\.txt"):
        Conversion.prepare(tiny_pipeline_folder, tmp_path / "out", recipe)
