"""Rules for every family in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import diffusers
import pytest
from torch import nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.table import FAMILIES, find_family

Specs = Callable[[str], Mapping[str, TensorSpec]]

ONLY_DIFFUSERS = (
    "SD3Transformer2DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "HeliosTransformer3DModel",
    "HunyuanImageTransformer2DModel",
)


def is_of_diffusers(family: Family) -> bool:
    """Whether diffusers has its classes; others are tested with the names that vLLM-Omni reads, and with its code."""
    return family.refusal("diffusers") is None


def groups_of(model_class: str, specs: Specs, runtime: str) -> list[LayerGroup]:
    return find_family(model_class).layer_groups(specs(model_class), runtime)


def test_every_pattern_matches_a_layer_of_some_model(tiny_specs: Specs) -> None:
    unmatched = set()
    for family in FAMILIES:
        names = {
            group.runtime_name
            for model_class in family.model_classes
            if family.layers and is_of_diffusers(family)
            for runtime in ("vllm-omni", "diffusers")
            for group in groups_of(model_class, tiny_specs, runtime)
        }
        unmatched |= {
            pattern.runtime_name
            for pattern in family.layers
            if is_of_diffusers(family) and pattern.runtime_name.replace("{}", "0") not in names
        }
    # FastVideo's and I2V's variants of Wan have layers that diffusers' plain classes lack.
    assert unmatched == {
        "blocks.{}.attn1.to_gate_compress",
        "vace_blocks.{}.attn1.to_gate_compress",
        "vace_blocks.{}.attn2.add_k_proj",
        "vace_blocks.{}.attn2.add_v_proj",
    }


@pytest.mark.parametrize("model_class", ONLY_DIFFUSERS)
def test_families_that_the_runtime_builds_in_full_precision_yield_nothing_and_say_why(
    model_class: str, tiny_specs: Specs
) -> None:
    family = find_family(model_class)
    assert not family.is_generic
    refusal = family.refusal("vllm-omni")
    assert refusal is not None
    assert "--force" not in refusal.advice  # no layer would be left to quantize
    assert family.layer_groups(tiny_specs(model_class), "vllm-omni") == []
    assert family.refusal("diffusers") is None
    assert family.layer_groups(tiny_specs(model_class), "diffusers")


@pytest.mark.parametrize("model_class", ONLY_DIFFUSERS)
def test_members_are_linear_modules_of_the_model(
    model_class: str, tiny_specs: Specs, tiny_model: Callable[[str, str], nn.Module]
) -> None:
    model = tiny_model("diffusers", model_class)
    stems = [stem for group in groups_of(model_class, tiny_specs, "diffusers") for stem in group.members]
    assert len(stems) == len(set(stems))
    for stem in stems:
        assert isinstance(model.get_submodule(stem), nn.Linear), stem


def test_every_model_class_exists_and_belongs_to_one_family() -> None:
    classes = [model_class for family in FAMILIES for model_class in family.model_classes]
    assert len(classes) == len(set(classes))
    for family in FAMILIES:
        for model_class in family.model_classes:
            assert hasattr(diffusers, model_class) == is_of_diffusers(family), model_class


@pytest.mark.parametrize(
    "model_class",
    [
        "HiDreamImageTransformer2DModel",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6Transformer3DModel",
        "Kandinsky6SRTransformer3DModel",
        "WanAnimateTransformer3DModel",
        "WanAnimate2Transformer3DModel",
        "WanModel_S2V",
        "ChromaTransformer2DModel",
    ],
)
def test_models_that_the_runtime_does_not_run_quantized_are_refused_for_versions_by_name(model_class: str) -> None:
    refusal = find_family(model_class).refusal("vllm-omni")
    assert refusal is not None
    assert refusal.is_final
    assert "0.30.0" in refusal.reason
    assert "0.32.0rc1" in refusal.reason
    # What the advice names must be there.
    assert ("--runtime diffusers" in refusal.advice) == hasattr(diffusers, model_class)


def test_recommended_patterns_match_layers(tiny_specs: Specs) -> None:
    for family in FAMILIES:
        for recommendation in family.recommendations:
            names = [group.runtime_name for group in groups_of(family.model_classes[0], tiny_specs, "vllm-omni")]
            assert any(fnmatchcase(f".{name}.", f"*.{recommendation.pattern}.*") for name in names)
