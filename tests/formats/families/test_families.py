"""The facts about each family, against a tiny model of its real class and tables copied from the runtime by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import diffusers
import pytest
from torch import nn
from transformers import Mistral3Config

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.table import FAMILIES, find_family

Specs = Callable[[str], Mapping[str, TensorSpec]]

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

# Runtime name → members (leaves only where they differ from the runtime's) of one block, for `vllm-omni`.
DOUBLE_STREAM = {"attn.to_qkv": QKV, "attn.add_kv_proj": ADDED, "attn.to_out.0": (), "attn.to_add_out": ()}
Z_IMAGE_BLOCK = {
    "attention.to_qkv": QKV,
    "attention.to_out.0": (),
    "feed_forward.w13": ("w1", "w3"),
    "feed_forward.w2": (),
}
FLUX_SINGLE = {"attn.to_qkv": QKV, "proj_mlp": (), "proj_out": ()}
FLUX_2_SINGLE: dict[str, tuple[str, ...]] = {"attn.to_qkv_mlp_proj": (), "attn.to_out": ()}
FEED_FORWARDS: dict[str, tuple[str, ...]] = {
    "ff.net.0.proj": (),
    "ff.net.2": (),
    "ff_context.net.0.proj": (),
    "ff_context.net.2": (),
}
WAN_BLOCK = {
    "attn1.to_qkv": QKV,
    "attn1.to_out": ("to_out.0",),
    "attn2.to_q": (),
    "attn2.to_k": (),
    "attn2.to_v": (),
    "attn2.to_out": ("to_out.0",),
    "ffn.net_0.proj": ("net.0.proj",),
    "ffn.net_2": ("net.2",),
}
LTX_2_BLOCK = {
    "attn1.to_qkv": QKV,
    "attn1.to_out.0": (),
    **{
        f"{attention}.{leaf}": ()
        for attention in ("audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
        for leaf in (*QKV, "to_out.0")
    },
    **{f"{ff}.{leaf}": () for ff in ("ff", "audio_ff") for leaf in ("net.0.proj", "net.2")},
}
BLOCKS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "ZImageTransformer2DModel": dict.fromkeys(
        ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"), Z_IMAGE_BLOCK
    ),
    "QwenImageTransformer2DModel": {
        f"transformer_blocks.{number}": DOUBLE_STREAM
        | {f"{mlp}.{leaf}": () for mlp in ("img_mlp", "txt_mlp") for leaf in ("net.0.proj", "net.2")}
        for number in range(2)
    },
    "FluxTransformer2DModel": {f"single_transformer_blocks.{number}": FLUX_SINGLE for number in range(2)},
    "Flux2Transformer2DModel": {
        **{
            f"transformer_blocks.{number}": DOUBLE_STREAM
            | {f"{ff}.{leaf}": () for ff in ("ff", "ff_context") for leaf in ("linear_in", "linear_out")}
            for number in range(2)
        },
        **{f"single_transformer_blocks.{number}": FLUX_2_SINGLE for number in range(2)},
    },
    "HunyuanVideo15Transformer3DModel": {
        f"transformer_blocks.{number}": DOUBLE_STREAM | FEED_FORWARDS for number in range(2)
    },
    "WanTransformer3DModel": {
        f"blocks.{number}": WAN_BLOCK | {"attn2.add_k_proj": (), "attn2.add_v_proj": ()} for number in range(2)
    },
    "WanVACETransformer3DModel": {
        f"{block}.{number}": WAN_BLOCK for block in ("blocks", "vace_blocks") for number in range(2)
    },
    "GlmImageTransformer2DModel": {
        f"transformer_blocks.{number}": {
            "attn1.to_qkv": QKV,
            "attn1.to_out.0": (),
            "ff.net.0.proj": (),
            "ff.net.2": (),
            "norm1.linear": (),
        }
        for number in range(2)
    }
    | {f"{name}_projector": {"net.0.proj": (), "net.2": ()} for name in ("glyph", "prior")},
    "LTX2VideoTransformer3DModel": {f"transformer_blocks.{number}": LTX_2_BLOCK for number in range(2)},
}

# Linears that the runtime builds in full precision.
NEVER = {
    "ZImageTransformer2DModel": (
        "layers.0.adaLN_modulation.0",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
        "all_x_embedder.2-1",
        "all_final_layer.2-1.linear",
        "all_final_layer.2-1.adaLN_modulation.1",
    ),
    "QwenImageTransformer2DModel": (
        "transformer_blocks.0.img_mod.1",
        "transformer_blocks.0.txt_mod.1",
        "img_in",
        "txt_in",
        "time_text_embed.timestep_embedder.linear_1",
        "norm_out.linear",
        "proj_out",
    ),
    "FluxTransformer2DModel": (
        "transformer_blocks.0.norm1.linear",
        "single_transformer_blocks.0.norm.linear",
        "x_embedder",
        "context_embedder",
        "time_text_embed.guidance_embedder.linear_1",
        "norm_out.linear",
        "proj_out",
    ),
    "Flux2Transformer2DModel": (
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "x_embedder",
        "context_embedder",
        "time_guidance_embed.timestep_embedder.linear_1",
        "norm_out.linear",
        "proj_out",
    ),
    "HunyuanVideo15Transformer3DModel": (
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
        "context_embedder_2.linear_1",
        "image_embedder.linear_1",
        "time_embed.timestep_embedder.linear_1",
        "transformer_blocks.0.norm1.linear",
        "cond_type_embed",
        "proj_out",
    ),
    "WanTransformer3DModel": (
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "patch_embedding",
        "proj_out",
    ),
    "WanVACETransformer3DModel": ("vace_blocks.0.proj_in", "vace_blocks.1.proj_out", "vace_patch_embedding"),
    "GlmImageTransformer2DModel": ("image_projector.proj", "prior_token_embedding", "norm_out.linear", "proj_out"),
    "LTX2VideoTransformer3DModel": (
        "transformer_blocks.0.attn1.to_gate_logits",
        "proj_in",
        "audio_proj_out",
        "caption_projection.linear_1",
        "time_embed.linear",
    ),
}

ONLY_DIFFUSERS = (
    "SD3Transformer2DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "HeliosTransformer3DModel",
)


def expected_groups(model_class: str) -> dict[str, tuple[str, ...]]:
    """Runtime name → members, spelled out."""
    groups = {}
    for block, layers in BLOCKS[model_class].items():
        for name, leaves in layers.items():
            parent = (
                f"{block}.{name}".rsplit(".net_", 1)[0] if ".net_" in name else f"{block}.{name}".rpartition(".")[0]
            )
            groups[f"{block}.{name}"] = tuple(f"{parent}.{leaf}" for leaf in leaves) or (f"{block}.{name}",)
    return groups


def groups_of(model_class: str, specs: Specs, runtime: str) -> list[LayerGroup]:
    return find_family(model_class).layer_groups(specs(model_class), runtime)


@pytest.mark.parametrize("model_class", BLOCKS)
def test_runtime_layers_and_their_members(model_class: str, tiny_specs: Specs) -> None:
    groups = groups_of(model_class, tiny_specs, "vllm-omni")
    assert {group.runtime_name: group.members for group in groups} == expected_groups(model_class)


@pytest.mark.parametrize("model_class", BLOCKS)
def test_fused_is_what_has_several_logical_widths(model_class: str, tiny_specs: Specs) -> None:
    fused = {group.runtime_name for group in groups_of(model_class, tiny_specs, "vllm-omni") if group.is_fused}
    merged = re.compile(r".*\.(to_qkv|add_kv_proj|w13|linear_in)")
    assert fused == {name for name in expected_groups(model_class) if merged.fullmatch(name)}


@pytest.mark.parametrize("runtime", ["vllm-omni", "diffusers"])
@pytest.mark.parametrize("model_class", NEVER)
def test_layers_in_full_precision_are_never_quantized(model_class: str, runtime: str, tiny_specs: Specs) -> None:
    grouped = {stem for group in groups_of(model_class, tiny_specs, runtime) for stem in group.members}
    for stem in NEVER[model_class]:
        assert f"{stem}.weight" in tiny_specs(model_class)
        assert stem not in grouped


@pytest.mark.parametrize("runtime", ["vllm-omni", "diffusers"])
@pytest.mark.parametrize("model_class", [*BLOCKS, *ONLY_DIFFUSERS])
def test_members_are_linear_modules_of_the_model(
    model_class: str, runtime: str, tiny_specs: Specs, tiny_model: Callable[[str, str], nn.Module]
) -> None:
    model = tiny_model("diffusers", model_class)
    stems = [stem for group in groups_of(model_class, tiny_specs, runtime) for stem in group.members]
    assert len(stems) == len(set(stems))
    for stem in stems:
        assert isinstance(model.get_submodule(stem), nn.Linear), stem


def test_every_pattern_matches_a_layer_of_some_model(tiny_specs: Specs) -> None:
    unmatched = set()
    for family in FAMILIES:
        names = {
            group.runtime_name
            for model_class in family.model_classes
            if family.layers
            for runtime in ("vllm-omni", "diffusers")
            for group in groups_of(model_class, tiny_specs, runtime)
        }
        unmatched |= {
            pattern.runtime_name for pattern in family.layers if pattern.runtime_name.replace("{}", "0") not in names
        }
    # FastVideo's and I2V's variants of Wan have layers that diffusers' plain classes lack.
    assert unmatched == {
        "blocks.{}.attn1.to_gate_compress",
        "vace_blocks.{}.attn1.to_gate_compress",
        "vace_blocks.{}.attn2.add_k_proj",
        "vace_blocks.{}.attn2.add_v_proj",
    }


def test_flux_1_double_blocks_are_only_in_the_scope_of_diffusers(tiny_specs: Specs) -> None:
    omni = {group.runtime_name for group in groups_of("FluxTransformer2DModel", tiny_specs, "vllm-omni")}
    ours = {group.runtime_name for group in groups_of("FluxTransformer2DModel", tiny_specs, "diffusers")}
    double = {
        f"transformer_blocks.{number}.{layer}" for number in range(2) for layer in {**DOUBLE_STREAM, **FEED_FORWARDS}
    }
    assert not any(name.startswith("transformer_blocks") for name in omni)
    assert ours == omni | double


def test_glm_image_lists_what_it_keeps_so_that_it_can_be_ignored(tiny_specs: Specs) -> None:
    groups = groups_of("GlmImageTransformer2DModel", tiny_specs, "vllm-omni")
    kept = {group.runtime_name for group in groups if group.keep_reason}
    assert kept == {
        *(f"transformer_blocks.{number}.norm1.linear" for number in range(2)),
        *(f"{name}_projector.net.{layer}" for name in ("glyph", "prior") for layer in ("0.proj", "2")),
    }
    ours = {group.runtime_name for group in groups_of("GlmImageTransformer2DModel", tiny_specs, "diffusers")}
    assert ours == {group.runtime_name for group in groups} - kept


@pytest.mark.parametrize("model_class", ONLY_DIFFUSERS)
def test_families_that_the_runtime_builds_in_full_precision_yield_nothing_and_say_why(
    model_class: str, tiny_specs: Specs
) -> None:
    family = find_family(model_class)
    assert not family.is_generic
    assert family.unsupported("vllm-omni")
    assert family.layer_groups(tiny_specs(model_class), "vllm-omni") == []
    assert family.unsupported("diffusers") is None
    assert family.layer_groups(tiny_specs(model_class), "diffusers")


def test_wan_refuses_modelopt_blocks_and_nothing_else() -> None:
    wan = find_family("WanVACETransformer3DModel")
    assert "fp8" in str(wan.unsupported("vllm-omni", "nvfp4"))
    assert wan.unsupported("vllm-omni", "fp8") is None
    assert wan.unsupported("diffusers", "nvfp4") is None


def test_every_model_class_exists_and_belongs_to_one_family() -> None:
    classes = [model_class for family in FAMILIES for model_class in family.model_classes]
    assert len(classes) == len(set(classes))
    for model_class in classes:
        assert hasattr(diffusers, model_class), model_class


def test_recommended_patterns_match_layers(tiny_specs: Specs) -> None:
    for family in FAMILIES:
        for recommendation in family.recommendations:
            names = [group.runtime_name for group in groups_of(family.model_classes[0], tiny_specs, "vllm-omni")]
            assert any(fnmatchcase(f".{name}.", f"*.{recommendation.pattern}.*") for name in names)


def test_qwen_image_recommends_img_mlp_only_where_a_guide_does() -> None:
    family = find_family("QwenImageTransformer2DModel")
    assert [each.pattern for each in family.recommended_ignored("fp8")] == ["img_mlp"]
    assert family.recommended_ignored("int8") == ()


def test_z_image_encoder_names_are_all_linears_of_the_causal_model(
    tiny_model: Callable[[str, str], nn.Module],
) -> None:
    encoder = tiny_model("transformers", "Qwen3ForCausalLM")
    linears = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    names = find_family("ZImageTransformer2DModel").shared_encoder_layers(encoder.config.to_dict())
    assert set(names) == linears
    assert len(names) == len(linears)


def test_flux_2_dev_encoder_names_come_from_the_nested_text_config() -> None:
    config = Mistral3Config().to_dict()
    count = config["text_config"]["num_hidden_layers"]
    names = set(find_family("Flux2Transformer2DModel").shared_encoder_layers(config))
    layers = "text_encoder.language_model.model.layers"
    # What the runtime asks for: 4 merged layers each; the parts are listed besides.
    assert {
        f"{layers}.{number}.{leaf}"
        for number in range(count)
        for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    } <= names
    assert len(names) == 9 * count


def test_other_encoders_share_nothing(tiny_model: Callable[[str, str], nn.Module]) -> None:
    klein = tiny_model("transformers", "Qwen3ForCausalLM").config.to_dict()
    assert find_family("Flux2Transformer2DModel").shared_encoder_layers(klein) == ()
    assert find_family("QwenImageTransformer2DModel").shared_encoder_layers(klein) == ()
