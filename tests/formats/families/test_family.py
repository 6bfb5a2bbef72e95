"""Matching against real names: exact, complete, and the generic rule for everything unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.table import find_family

Specs = Callable[[str], Mapping[str, TensorSpec]]
Z_IMAGE = "ZImageTransformer2DModel"


def specs_of(*names: str, shape: tuple[int, ...] = (64, 64)) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, torch.bfloat16, shape) for name in names}


def generic_groups(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, ...]]:
    groups = find_family("SomethingNew2DModel").layer_groups(specs, "diffusers")
    return {group.runtime_name: group.members for group in groups}


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


def test_unknown_class_is_generic_and_warns_for_another_runtime() -> None:
    family = find_family("SomethingNew2DModel")
    assert family.is_generic
    assert any("SomethingNew2DModel is unknown here" in note for note in family.notes("fp8", "vllm-omni", ()))
    assert family.notes("fp8", "diffusers", ()) == ()


def test_generic_rule_on_a_real_model(tiny_specs: Specs) -> None:
    """PixArt: embedders, adaLN, caption projection and the final projection stay; cross-attention is not fused."""
    groups = generic_groups(tiny_specs("PixArtTransformer2DModel"))
    block = {
        "attn1.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        **{name: (name,) for name in ("attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")},
        **{name: (name,) for name in ("ff.net.0.proj", "ff.net.2")},
    }
    assert groups == {
        f"transformer_blocks.{number}.{name}": tuple(f"transformer_blocks.{number}.{member}" for member in members)
        for number in range(2)
        for name, members in block.items()
    }


def test_generic_rule_on_t5_leaves_the_position_bias(tiny_model: Callable[[str, str], nn.Module]) -> None:
    """An embedding inside a block is two-dimensional like a linear; only its name tells."""
    model = tiny_model("transformers", "T5EncoderModel")
    specs = specs_of(*(name for name in model.state_dict() if model.state_dict()[name].ndim == 2))
    stems = {stem for members in generic_groups(specs).values() for stem in members}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert stems == linears
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in specs


def test_generic_rule_fuses_the_attention_of_a_language_model(tiny_model: Callable[[str, str], nn.Module]) -> None:
    state = tiny_model("transformers", "Qwen3ForCausalLM").state_dict()
    specs = {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    layer = "model.layers.2"
    groups = generic_groups(specs)
    assert groups[f"{layer}.self_attn.qkv_proj"] == tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv")
    assert groups[f"{layer}.mlp.gate_up_proj"] == (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
    assert "lm_head" not in groups
    assert len(groups) == 3 * 4


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.norm1.linear.weight",
        "blocks.0.adaLN_modulation.1.weight",
        "blocks.0.img_mod.lin.weight",
        "blocks.0.time_emb_proj.weight",
        "blocks.0.mlp.gate.weight",
        "blocks.0.scale_shift.weight",
        "embedder.blocks.0.fc1.weight",
        "final_layer.weight",
        "proj_out.weight",
        "time_mlp.0.weight",
        "time_mlp.2.weight",
        "projector.net.0.proj.weight",
        "blocks.0.attn.to_q.bias",
    ],
)
def test_generic_rule_leaves_alone(name: str) -> None:
    inside = specs_of("blocks.0.fc1.weight", "blocks.0.fc2.weight")
    assert set(generic_groups(inside | specs_of(name))) == {"blocks.0.fc1", "blocks.0.fc2"}


@pytest.mark.parametrize("shape", [(64,), (64, 64, 1), (64, 64, 3, 3), ()])
def test_only_matrices_are_candidates(shape: tuple[int, ...]) -> None:
    inside = specs_of("blocks.0.fc1.weight", "blocks.0.fc2.weight")
    assert "blocks.0.conv" not in generic_groups(inside | specs_of("blocks.0.conv.weight", shape=shape))


def test_generic_fused_group_needs_all_members_and_one_width() -> None:
    members = [f"blocks.0.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v")]
    whole = specs_of(*(f"{stem}.weight" for stem in members))
    assert generic_groups(whole) == {"blocks.0.attn.to_qkv": tuple(members)}
    other_width = whole | specs_of(f"{members[0]}.weight", shape=(64, 32))
    assert generic_groups(other_width) == {stem: (stem,) for stem in members}
    without_v = {name: spec for name, spec in whole.items() if "to_v" not in name}
    assert generic_groups(without_v) == {stem: (stem,) for stem in members[:2]}


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
