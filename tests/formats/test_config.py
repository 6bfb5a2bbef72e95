"""A config that contradicts itself cannot exist."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from omni_convert.formats.config import ACTIVATION_SCHEMES, MIXED, QuantizationConfig
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.format import Calibration
from omni_convert.formats.options import check_group_size
from omni_convert.formats.table import FORMATS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "fp9"}, r"method: found 'fp9', expected one of fp8, int8"),
        ({"method": "int8", "activation_scheme": "static"}, r"found 'static' with int8, expected dynamic"),
        ({"method": "nvfp4"}, r"found 'dynamic' with nvfp4, expected static or none"),
        ({"method": "fp8", "activation_scheme": "none"}, r"expected dynamic or static"),
        ({"method": "int8", "weight_block_size": (128, 128)}, r"weight_block_size: found with int8"),
        (
            {"method": "fp8", "activation_scheme": "static", "weight_block_size": (128, 128)},
            r"weight_block_size: found with fp8 and static activations, expected fp8 and dynamic ones",
        ),
        ({"method": "fp8", "weight_block_size": (0, 128)}, r"found \[0, 128\], expected two positive sizes"),
        ({"method": "mxfp8", "require_smooth_scale": True}, r"require_smooth_scale: found with mxfp8"),
        ({"method": "mxfp4", "require_smooth_scale": 1}, r"require_smooth_scale: found 1, expected True or False"),
        ({"method": "fp8", "per_channel": "no"}, r"per_channel: found 'no', expected True or False"),
        (
            {"method": "fp8", "per_channel": True, "weight_block_size": (128, 128)},
            r"per_channel: found with weight_block_size \[128, 128\], expected one of the two",
        ),
        (
            {"method": "int8", "per_channel": True},
            r"per_channel: found with int8 and dynamic activations, expected fp8",
        ),
        ({"method": "fp8", "group_size": 32}, r"group_size: found with fp8, expected w4a16"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizationConfig(**fields)


def test_a_method_that_is_offered_has_a_config() -> None:
    assert set(FORMATS) <= set(ACTIVATION_SCHEMES)


@pytest.mark.parametrize("method", sorted(set(FORMATS) & set(ACTIVATION_SCHEMES)))
def test_static_activations_are_allowed_where_the_format_stores_an_input_scale(method: str) -> None:
    stores_input_scale = FORMATS[method].calibration is Calibration.INPUT_SCALE
    assert stores_input_scale == ("static" in ACTIVATION_SCHEMES[method])


def test_static_means_that_an_input_scale_is_stored() -> None:
    assert QuantizationConfig("fp8", "static").is_static
    assert not QuantizationConfig("fp8").is_static
    assert not QuantizationConfig("nvfp4", "none").is_static


@pytest.mark.parametrize("size", [None, 32, 64, 128])
def test_group_sizes_of_the_kernels_may_be_asked_for(size: int | None) -> None:
    check_group_size(size, "--group-size")


@pytest.mark.parametrize("size", [7, 0, -1, 256, True, 32.0, "32", "a", [32]], ids=repr)
def test_other_group_sizes_are_refused_under_the_name_that_the_user_wrote(size: object) -> None:
    with pytest.raises(RecipeError, match=r"^--group-size: found .*, expected one of 32, 64, 128$"):
        check_group_size(size, "--group-size")


def test_layers_are_found_by_name_in_a_mapping_that_is_built_once() -> None:
    int8 = QuantizationConfig("int8")
    mixed = QuantizationConfig(MIXED, layers=(("a", int8), ("b", QuantizationConfig("fp8"))))
    assert mixed.of_layer("a") is int8
    assert mixed.of_layer("c") is None
    assert mixed._by_layer is mixed._by_layer  # that it is kept cannot be seen otherwise
    assert mixed == replace(mixed)
