"""Families whose layers in vLLM-Omni are not known here: the generic rule chooses them for our own loader."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes, rotary_axes
from omni_convert.formats.families.family import Family, GgufFacts, unknown_scope
from omni_convert.formats.families.flux_1 import MLP_EMBEDDER, ORIGINAL_MODULATION, ORIGINAL_SINGLE, SINGLE
from omni_convert.formats.families.hunyuan_video import (
    ORIGINAL_DOUBLE_BLOCK,
    ORIGINAL_JOINED_ATTENTION,
    ORIGINAL_TEXT,
    TRAINER_NAMES,
)
from omni_convert.formats.families.layers import QKV
from omni_convert.formats.families.original_names import OriginalName, joined, renamed, same

__all__ = [
    "AURA_FLOW",
    "COSMOS",
    "FRAMEPACK",
    "HUNYUAN_VIDEO",
    "LUMINA_2",
    "MINIMAX_H3",
    "SANA_WM",
]

_UNKNOWN = unknown_scope("this model")

MINIMAX_H3 = Family("MiniMax-H3", ("MiniMaxH3Transformer3DModel",), refusals=_UNKNOWN)
SANA_WM = Family("SANA-WM", ("SanaWMTransformer3DModel",), refusals=_UNKNOWN)

AURA_FLOW = Family(
    "AuraFlow", ("AuraFlowTransformer2DModel",), refusals=_UNKNOWN, gguf=GgufFacts("aura", has_converter=True)
)
COSMOS = Family(
    "Cosmos", ("CosmosTransformer3DModel",), refusals=_UNKNOWN, gguf=GgufFacts("cosmos", has_converter=True)
)


def _hunyuan_video_settings(shapes: Shapes) -> dict[str, Any]:
    inner, channels, frames, patch, _ = shapes.find("x_embedder.proj.weight") or (0, 0, 1, 1, 1)
    head = shapes.rows("transformer_blocks.0.attn.norm_q.weight")
    return {
        "in_channels": channels,
        "out_channels": shapes.rows("proj_out.weight") // (frames * patch**2),
        "num_attention_heads": inner // head,
        "attention_head_dim": head,
        "num_layers": shapes.count("transformer_blocks.{}.attn.norm_q.weight"),
        "num_single_layers": shapes.count("single_transformer_blocks.{}.attn.norm_q.weight"),
        "num_refiner_layers": shapes.count("context_embedder.token_refiner.refiner_blocks.{}.norm1.weight"),
        "mlp_ratio": shapes.rows("transformer_blocks.0.ff.net.0.proj.weight") / inner,
        "patch_size": patch,
        "patch_size_t": frames,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes.columns("context_embedder.proj_in.weight"),
        "pooled_projection_dim": shapes.columns("time_text_embed.text_embedder.linear_1.weight"),
        "rope_axes_dim": rotary_axes(head),
        "image_condition_type": "latent_concat" if channels == 33 else None,
    }


HUNYUAN_VIDEO = Family(
    "HunyuanVideo",
    ("HunyuanVideoTransformer3DModel",),
    refusals=_UNKNOWN,
    original_names=(
        *renamed(
            {
                "img_in.proj": "x_embedder.proj",
                "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
                "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
                "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
                "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
                "final_layer.linear": "proj_out",
            }
        ),
        *renamed(MLP_EMBEDDER, "vector_in.", "time_text_embed.text_embedder."),
        *ORIGINAL_TEXT,
        *ORIGINAL_JOINED_ATTENTION,
        *ORIGINAL_DOUBLE_BLOCK,
        joined(f"{ORIGINAL_SINGLE}linear1", SINGLE.removesuffix("."), *(f"attn.{part}" for part in QKV), "proj_mlp"),
        *renamed(
            {
                "linear2": "proj_out",
                "modulation.linear": "norm.linear",
                "q_norm": "attn.norm_q",
                "k_norm": "attn.norm_k",
            },
            ORIGINAL_SINGLE,
            SINGLE,
        ),
        ORIGINAL_MODULATION,
    ),
    trainer_names=(*TRAINER_NAMES, *renamed({"modulation.lin": "norm.linear"}, ORIGINAL_SINGLE, SINGLE)),
    gguf=GgufFacts("hyvid", has_converter=True),
    config=(
        ConfigRule(
            "HunyuanVideoTransformer3DModel",
            (
                "x_embedder.proj.weight",
                "context_embedder.proj_in.weight",
                "time_text_embed.text_embedder.linear_1.weight",
            ),
            _hunyuan_video_settings,
            {
                "rope_axes_dim": {"attention_head_dim": (128,)},
                "image_condition_type": {"image_condition_type": ("latent_concat",)},
            },
        ),
    ),
)
FRAMEPACK = replace(HUNYUAN_VIDEO, name="FramePack", model_classes=("HunyuanVideoFramepackTransformer3DModel",))


def _lumina_block(block: str, *, is_modulated: bool) -> tuple[OriginalName, ...]:
    """Names in a block of Lumina 2; only modulated blocks have a linear in their first norm."""
    ours = theirs = f"{block}.{{}}."
    first = {"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}
    names = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
    return (
        joined(f"{theirs}attention.qkv", f"{ours}attn", *QKV),
        *renamed(names, f"{theirs}attention.", f"{ours}attn."),
        *renamed({f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)}, theirs, ours),
        *renamed(first if is_modulated else {"attention_norm1": "norm1"}, theirs, ours),
        *renamed({"attention_norm2": "norm2"}, theirs, ours),
        *same(f"{ours}ffn_norm1", f"{ours}ffn_norm2"),
    )


def _lumina_settings(shapes: Shapes) -> dict[str, Any]:
    hidden, head = shapes.rows("x_embedder.weight"), shapes.rows("layers.0.attn.norm_q.weight")
    rows = shapes.rows("layers.0.attn.to_k.weight")  # of q, k and v where the file joins them
    return {
        "in_channels": shapes.columns("x_embedder.weight") // 4,
        "hidden_size": hidden,
        "num_layers": shapes.count("layers.{}.attn.norm_q.weight"),
        "num_refiner_layers": shapes.count("noise_refiner.{}.attn.norm_q.weight"),
        "num_attention_heads": hidden // head,
        "num_kv_heads": (rows if rows <= hidden else (rows - hidden) // 2) // head,
        "axes_dim_rope": [head // 3] * 3,
        "cap_feat_dim": shapes.rows("time_caption_embed.caption_embedder.0.weight"),
    }


LUMINA_2 = Family(
    "Lumina 2",
    ("Lumina2Transformer2DModel",),
    refusals=_UNKNOWN,
    original_names=(
        *same("x_embedder", "norm_final"),
        *renamed(
            {
                "cap_embedder": "time_caption_embed.caption_embedder",
                "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
                "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
                "final_layer.adaLN_modulation.1": "norm_out.linear_1",
                "final_layer.linear": "norm_out.linear_2",
            }
        ),
        *_lumina_block("layers", is_modulated=True),
        *_lumina_block("noise_refiner", is_modulated=True),
        *_lumina_block("context_refiner", is_modulated=False),
    ),
    gguf=GgufFacts(
        "lumina2",
        kept_layers=("noise_refiner", "context_refiner"),
        has_converter=True,
    ),
    config=(
        ConfigRule(
            "Lumina2Transformer2DModel",
            ("time_caption_embed.caption_embedder.0.weight", "layers.0.attn.norm_q.weight"),
            _lumina_settings,
            {"axes_dim_rope": {"num_attention_heads": (24,), "hidden_size": (2304,)}},
            spare=("norm_final.",),
        ),
    ),
)
