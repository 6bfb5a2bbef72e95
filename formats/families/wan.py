"""Wan 2.1 and 2.2, VACE included."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes
from omni_convert.formats.families.family import Family, GgufFacts, RuntimeRefusal, VariantRefusal
from omni_convert.formats.families.layers import QKV, VLLM_OMNI, LayerPattern, linears, merged
from omni_convert.formats.families.layers import renamed as renamed_layer
from omni_convert.formats.families.original_names import OriginalName, diffusers_name, renamed, same

__all__ = ["PUBLISHED", "WAN", "has_original_wan_names", "wan_diffusers_name", "wan_settings"]


def _block(block: str) -> tuple[LayerPattern, ...]:
    return (
        merged(f"{block}.attn1", "to_qkv", QKV),
        renamed_layer(f"{block}.attn1", "to_out.0", "to_out"),
        *linears(f"{block}.attn1", "to_gate_compress"),
        *linears(f"{block}.attn2", *QKV, "add_k_proj", "add_v_proj"),
        renamed_layer(f"{block}.attn2", "to_out.0", "to_out"),
        renamed_layer(f"{block}.ffn", "net.0.proj", "net_0.proj"),
        renamed_layer(f"{block}.ffn", "net.2", "net_2"),
    )


def _original_block(block: str) -> tuple[OriginalName, ...]:
    """Names within a block. The original code numbers the norms in order of use, diffusers by kind."""
    return renamed(
        {
            "modulation": "scale_shift_table",
            "norm2": "norm3",
            "norm3": "norm2",
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "self_attn.q": "attn1.to_q",
            "self_attn.k": "attn1.to_k",
            "self_attn.v": "attn1.to_v",
            "self_attn.o": "attn1.to_out.0",
            "self_attn": "attn1",
            "cross_attn.q": "attn2.to_q",
            "cross_attn.k": "attn2.to_k",
            "cross_attn.v": "attn2.to_v",
            "cross_attn.o": "attn2.to_out.0",
            "cross_attn.k_img": "attn2.add_k_proj",
            "cross_attn.v_img": "attn2.add_v_proj",
            "cross_attn.norm_k_img": "attn2.norm_added_k",
            "cross_attn": "attn2",
        },
        f"{block}.",
        f"{block}.",
    )


_ORIGINAL_NAMES = (
    *same("patch_embedding"),
    *renamed(
        {
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
            "head.modulation": "scale_shift_table",
            "head.head": "proj_out",
        }
    ),
    *_original_block("blocks.{}"),
    *same("vace_patch_embedding"),
    *renamed({"before_proj": "proj_in", "after_proj": "proj_out"}, "vace_blocks.{}.", "vace_blocks.{}."),
    *_original_block("vace_blocks.{}"),
)
# A name that diffusers' conversion of single files would drop.
_ALSO_READ = renamed({"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"})


def wan_settings(shapes: Shapes) -> dict[str, Any]:
    """Settings that all models of Wan have."""
    inner, channels, *patch = shapes.find("patch_embedding.weight") or (0, 0, 1, 1, 1)
    embedder = "condition_embedder.image_embedder"
    positions = shapes.find(f"{embedder}.pos_embed")
    return {
        "patch_size": patch,
        "num_attention_heads": inner // 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": shapes.rows("proj_out.weight") // math.prod(patch),
        "text_dim": shapes.columns("condition_embedder.text_embedder.linear_1.weight"),
        "freq_dim": shapes.columns("condition_embedder.time_embedder.linear_1.weight"),
        "ffn_dim": shapes.rows("blocks.0.ffn.net.0.proj.weight"),
        "num_layers": shapes.count("blocks.{}.attn1.norm_q.weight"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": shapes.rows(f"{embedder}.norm1.weight") if f"{embedder}.norm1.weight" in shapes else None,
        "added_kv_proj_dim": shapes.columns_if_any("blocks.0.attn2.add_k_proj.weight"),
        "pos_embed_seq_len": positions[1] if positions is not None else None,
    }


def _vace_settings(shapes: Shapes) -> dict[str, Any]:
    settings, copies = wan_settings(shapes), shapes.count("vace_blocks.{}.attn1.norm_q.weight")
    step = max(settings["num_layers"] // copies, 1) if copies else 1
    layers = list(range(0, settings["num_layers"], step))[:copies]
    return {**settings, "vace_layers": layers, "vace_in_channels": shapes.columns("vace_patch_embedding.weight")}


# The sizes 1.3B, 5B and 14B, whose heads have 128 channels.
PUBLISHED = {"num_attention_heads": (12, 24, 40), "ffn_dim": (8960, 14336, 13824)}

WAN = Family(
    name="Wan",
    model_classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    layers=(*_block("blocks.{}"), *_block("vace_blocks.{}")),
    refusals=(
        RuntimeRefusal(
            VLLM_OMNI,
            "vLLM-Omni 0.30.0 and 0.32.0rc1 cannot load ModelOpt blocks (nvfp4) for Wan; on CUDA use fp8, or --dialect "
            "auto-round with vLLM-Omni 0.32.0rc1",
            methods=("nvfp4",),
            dialects=("vllm-omni", "modelopt"),
        ),
        RuntimeRefusal(
            VLLM_OMNI,
            "vLLM-Omni 0.30.0 and 0.32.0rc1 cannot load ModelOpt blocks for Wan; with --dialect vllm-omni they read "
            "one format, alone or beside bf16 (--formats fp8,bf16)",
            methods=("fp8", "mxfp8"),
            dialects=("modelopt",),
        ),
    ),
    refused_variants=(
        VariantRefusal(
            "in_channels",
            48,
            ("mxfp4", "mxfp4_dualscale"),
            "4-bit activations harm Wan2.2-TI2V-5B too much, vLLM-Omni's own converter leaves it out",
        ),
    ),
    leading_blocks=(("mxfp4_dualscale", 5),),
    original_names=_ORIGINAL_NAMES,
    comfyui_names=_ALSO_READ,
    gguf=GgufFacts(
        "wan",
        kept_layers=("condition_embedder",),
        has_converter=True,
    ),
    config=(
        ConfigRule(
            "WanVACETransformer3DModel",
            ("condition_embedder.time_proj.weight", "vace_patch_embedding.weight"),
            _vace_settings,
            {"num_attention_heads": PUBLISHED, "vace_layers": PUBLISHED},
        ),
        ConfigRule(
            "WanTransformer3DModel",
            ("condition_embedder.time_proj.weight", "blocks.0.attn2.norm_q.weight"),
            wan_settings,
            {"num_attention_heads": PUBLISHED},
        ),
    ),
)


def has_original_wan_names(names: Container[str]) -> bool:
    """Whether a checkpoint has the names of Wan's own code."""
    return any(name in names for name in ("blocks.0.self_attn.norm_q.weight", "blocks.0.cross_attn.norm_q.weight"))


def wan_diffusers_name(name: str) -> str:
    """The name in diffusers of a tensor of Wan's own code; other names stay."""
    return diffusers_name((*_ORIGINAL_NAMES, *_ALSO_READ), name)
