from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omni_convert.convert.recipe import METHODS, RUNTIMES, STORAGE_METHODS, Recipe
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.layers import EVERY_RUNTIME
from omni_convert.formats.table import FORMATS


def test_methods_are_those_of_the_format_table() -> None:
    assert {*METHODS, *STORAGE_METHODS} == set(FORMATS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fp9"}, "--method: found 'fp9', expected one of .*; did you mean 'fp8'"),
        ({"activation_scheme": "sometimes"}, "--activation-scheme: found 'sometimes'"),
        ({"component": {"text_encoder": "int9"}}, "--component text_encoder: found 'int9'.*did you mean 'int8'"),
        (
            {"method": "int8", "weight_block_size": (128, 128)},
            "--weight-block-size: found with method 'int8', .* expected method fp8",
        ),
        ({"method": "int8", "rotate": True}, "--rotate: found with --dialect vllm-omni, expected --dialect comfyui"),
        ({"method": "fp8", "rotate": True}, "--rotate: found with method 'fp8'.*expected method int8"),
        ({"weight_block_size": (0, 128)}, "found 0,128, expected two positive sizes"),
        ({"input_scale": "median"}, "expected max, mse or percentile:P"),
        ({"input_scale": "percentile:101"}, "expected max, mse or percentile:P"),
        ({"input_scale": "percentile:x"}, "expected max, mse or percentile:P"),
        ({"calib": Path("a"), "calibration": (Path("b"),)}, "found both, expected one"),
    ],
)
def test_a_value_that_no_checkpoint_could_satisfy_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**options)


@pytest.mark.parametrize("rule", ["max", "mse", "percentile:99.9", "percentile:100"])
def test_input_scale_rules_are_accepted(rule: str) -> None:
    assert Recipe(input_scale=rule).input_scale == rule


@pytest.mark.parametrize(
    ("dialect", "runtime"), [("comfyui", "comfyui"), ("vllm-omni", "vllm-omni"), ("modelopt", "vllm-omni")]
)
def test_the_runtime_is_the_dialects_unless_another_is_named(dialect: str, runtime: str) -> None:
    assert Recipe(dialect=dialect).runtime == runtime
    assert Recipe(dialect=dialect, runtime="diffusers").runtime == "diffusers"


def test_a_runtime_that_does_not_read_the_dialect_is_refused() -> None:
    with pytest.raises(RecipeError, match="--runtime comfyui: found with --dialect vllm-omni, expected vllm-omni or d"):
        Recipe(runtime="comfyui")


def test_runtimes_are_those_that_families_know() -> None:
    assert RUNTIMES == EVERY_RUNTIME


def test_the_manifest_names_what_decides_the_bytes_and_nothing_else() -> None:
    recipe = Recipe(method="int8", ignored_layers=("b", "a"), device="cuda", overwrite=True, calib=Path("prompts.txt"))
    assert recipe.of_the_bytes() == {"method": "int8", "ignored_layers": ["a", "b"]}
    marked = Recipe(method="int8", dialect="comfyui").of_the_bytes()
    assert marked == {"method": "int8", "dialect": "comfyui", "runtime": "comfyui"}


def test_recipes_that_round_differently_have_different_manifests() -> None:
    statistics, moments = {"calibration": (Path("statistics"),)}, {"moments": (Path("moments"),)}
    named = {
        (bool(files.get("calibration")), bool(files.get("moments")), rounding): Recipe(
            "w4a16", **files, rounding=rounding
        )
        .of_the_bytes()
        .get("rounding")
        for files in (statistics, moments, {**statistics, **moments})
        for rounding in (None, "nearest", "gptq", "auto")
    }
    # Only files that are used are in the manifest, so that --rounding nearest must differ from the default by its name.
    assert named == {
        (True, False, None): None,
        (True, False, "nearest"): "nearest",
        (True, False, "gptq"): "gptq",
        (True, False, "auto"): "auto",
        (False, True, None): "auto",
        (False, True, "nearest"): None,
        (False, True, "gptq"): "gptq",
        (False, True, "auto"): "auto",
        (True, True, None): "auto",
        (True, True, "nearest"): "nearest",
        (True, True, "gptq"): "gptq",
        (True, True, "auto"): "auto",
    }


@pytest.mark.parametrize(
    ("method", "options", "option"),
    [
        ("fp8", {"scale_rule": "floor"}, "--scale-rule"),
        ("nvfp4", {"scale_rule": "floor"}, "--scale-rule"),
        ("mxfp8", {"input_scale": "mse"}, "--input-scale"),
        ("mxfp8", {"int8_fused_scales": "per-row"}, "--int8-fused-scales"),
        ("fp8", {"bf16_blocks": -3}, "--bf16-blocks"),
        ("int8", {"element": "e5m2", "dialect": "comfyui"}, "--element"),
        ("fp8", {"element": "e6m1"}, "--element"),
        ("fp8", {"element": "e5m2"}, "--element e5m2"),
    ],
)
def test_options_that_mean_nothing_are_refused(method: str, options: dict[str, Any], option: str) -> None:
    with pytest.raises(RecipeError, match=f"^{option}: found .*expected"):
        Recipe(method, **options)


def test_an_option_may_be_for_another_component() -> None:
    recipe = Recipe("mxfp8", component={"text_encoder": "int8"}, int8_fused_scales="per-row")
    assert recipe.int8_fused_scales == "per-row"
    recipe = Recipe("mxfp8", component={"text_encoder": "fp8"}, weight_block_size=(128, 128))
    assert recipe.weight_block_size == (128, 128)
