"""Matching against real names: exact and complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.table import find_family

Specs = Callable[[str], Mapping[str, TensorSpec]]
Z_IMAGE = "ZImageTransformer2DModel"


def specs_of(*names: str, shape: tuple[int, ...] = (64, 64)) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, torch.bfloat16, shape) for name in names}


@pytest.mark.parametrize("missing", ["to_q", "to_k", "to_v"])
def test_missing_member_of_a_fused_group_is_named(missing: str, tiny_specs: Specs) -> None:
    name = f"layers.1.attention.{missing}.weight"
    specs = {key: spec for key, spec in tiny_specs(Z_IMAGE).items() if key != name}
    with pytest.raises(
        CheckpointError, match=rf"^layers\.1\.attention\.{missing}\.weight: found no such matrix, expected"
    ):
        find_family(Z_IMAGE).layer_groups(specs, "vllm-omni")


def test_member_that_is_no_matrix_counts_as_missing(tiny_specs: Specs) -> None:
    specs = dict(tiny_specs(Z_IMAGE))
    name = "layers.0.feed_forward.w3.weight"
    specs[name] = replace(specs[name], shape=(170, 64, 1, 1))
    with pytest.raises(CheckpointError, match=r"^layers\.0\.feed_forward\.w3\.weight: found no such matrix"):
        find_family(Z_IMAGE).layer_groups(specs, "vllm-omni")


def test_members_with_other_input_widths_are_refused(tiny_specs: Specs) -> None:
    specs = dict(tiny_specs(Z_IMAGE))
    name = "layers.0.attention.to_k.weight"
    specs[name] = replace(specs[name], shape=(64, 32))
    with pytest.raises(CheckpointError, match=r"found in_features 32, expected 64"):
        find_family(Z_IMAGE).layer_groups(specs, "vllm-omni")


def test_names_match_as_a_whole(tiny_specs: Specs) -> None:
    strays = specs_of(
        "module.layers.0.attention.to_q.weight",
        "layers.0.attention.to_q.weight.bak",
        "layers.x.feed_forward.w2.weight",
        "layers.0.feed_forward.w2_extra.weight",
        "layers.0.feed_forward.w2.lora.weight",
        "layers0.feed_forward.w2.weight",
    )
    family = find_family(Z_IMAGE)
    assert family.layer_groups({**tiny_specs(Z_IMAGE), **strays}, "vllm-omni") == family.layer_groups(
        tiny_specs(Z_IMAGE), "vllm-omni"
    )


def test_groups_come_in_checkpoint_order(tiny_specs: Specs) -> None:
    specs = tiny_specs("QwenImageTransformer2DModel")
    backwards = dict(reversed(specs.items()))
    family = find_family("QwenImageTransformer2DModel")
    forward = family.layer_groups(specs, "vllm-omni")
    assert sorted(forward, key=repr) == sorted(family.layer_groups(backwards, "vllm-omni"), key=repr)
    order = {name: position for position, name in enumerate(specs)}
    first = [min(order[f"{stem}.weight"] for stem in group.members) for group in forward]
    assert first == sorted(first)


def test_foreign_spelling_of_a_known_family_is_an_error() -> None:
    specs = specs_of("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")
    with pytest.raises(
        CheckpointError, match=r"FLUX\.1: found none of its layers among 2 tensors, expected names such as"
    ):
        find_family("FluxTransformer2DModel").layer_groups(specs, "vllm-omni")


def test_merged_layers_are_taken_where_the_runtime_loads_them(tiny_specs: Specs) -> None:
    specs = {
        name: spec
        for name, spec in tiny_specs(Z_IMAGE).items()
        if not name.startswith(("layers.0.attention.to_q", "layers.0.attention.to_k", "layers.0.attention.to_v"))
    } | specs_of("layers.0.attention.to_qkv.weight", shape=(192, 64))
    groups = find_family(Z_IMAGE).layer_groups(specs, "vllm-omni")
    assert LayerGroup("layers.0.attention.to_qkv", ("layers.0.attention.to_qkv",), is_fused=True) in groups


def test_merged_layers_are_refused_where_the_runtime_does_not_load_them(tiny_specs: Specs) -> None:
    specs = {**tiny_specs(Z_IMAGE), **specs_of("layers.5.feed_forward.w13.weight")}
    with pytest.raises(CheckpointError, match=r"w13\.weight: found a merged layer, expected its parts \(w1, w3\)"):
        find_family(Z_IMAGE).layer_groups(specs, "vllm-omni")


def test_merged_layer_beside_its_parts_is_refused(tiny_specs: Specs) -> None:
    specs = {**tiny_specs(Z_IMAGE), **specs_of("layers.0.attention.to_qkv.weight")}
    with pytest.raises(CheckpointError, match="found both the merged layer and its parts"):
        find_family(Z_IMAGE).layer_groups(specs, "vllm-omni")


def test_unknown_class_is_generic_and_refused_for_vllm_omni() -> None:
    family = find_family("SomethingNew2DModel")
    assert family.is_generic
    refusal = family.refusal("vllm-omni", "fp8")
    assert refusal is not None
    assert "builds quantized for 'SomethingNew2DModel' is not known here" in refusal.reason
    assert "--runtime diffusers" in refusal.advice
    assert "--force" in refusal.advice
    assert family.refusal("diffusers", "fp8") is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": "36"},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 2.0},
        {"text_config": {}, "num_hidden_layers": 2},
    ],
    ids=repr,
)
def test_encoder_config_without_a_layer_count_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"^text_encoder/config\.json: found num_hidden_layers .*, expected 1 to"):
        find_family(Z_IMAGE).shared_encoder_layers(config)
