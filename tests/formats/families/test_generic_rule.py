"""The generic rule, for models whose layers no family states."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.table import find_family

Specs = Callable[[str], Mapping[str, TensorSpec]]
Z_IMAGE = "ZImageTransformer2DModel"


def specs_of(*names: str, shape: tuple[int, ...] = (64, 64)) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, torch.bfloat16, shape) for name in names}


def generic_groups(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, ...]]:
    groups = find_family("SomethingNew2DModel").layer_groups(specs, "diffusers")
    return {group.runtime_name: group.members for group in groups}


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
        "distilled_guidance_layer.layers.0.linear_1.weight",
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
