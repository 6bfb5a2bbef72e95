"""LTX-Video, and LTX-2, whose file vLLM-Omni 0.32.0rc1 also reads into a transformer without all that is for video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes
from omni_convert.formats.families.family import Family, GgufFacts, MethodNote, unknown_scope
from omni_convert.formats.families.layers import QKV, VLLM_OMNI, linears, merged
from omni_convert.formats.families.original_names import OriginalName, renamed, same

__all__ = ["LTX_2", "LTX_VIDEO"]

_GGUF = GgufFacts("ltxv")
_UNMERGED = ("audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


def _original_attention(attention: str) -> tuple[OriginalName, ...]:
    stem = f"transformer_blocks.{{}}.{attention}."
    return (
        *renamed({"q_norm": "norm_q", "k_norm": "norm_k"}, stem, stem),
        *same(*(stem + part for part in (*QKV, "to_out"))),
    )


def _ltx_settings(shapes: Shapes) -> dict[str, Any]:
    inner = shapes.rows("proj_in.weight")
    return {
        "in_channels": shapes.columns("proj_in.weight"),
        "out_channels": shapes.rows("proj_out.weight"),
        "num_attention_heads": 32,
        "attention_head_dim": inner // 32,
        "cross_attention_dim": shapes.columns("transformer_blocks.0.attn2.to_k.weight"),
        "num_layers": shapes.count("transformer_blocks.{}.scale_shift_table"),
        "caption_channels": shapes.columns("caption_projection.linear_1.weight"),
    }


def _ltx_2_settings(shapes: Shapes) -> dict[str, Any]:
    return {
        **_ltx_settings(shapes),
        "audio_in_channels": shapes.columns("audio_proj_in.weight"),
        "audio_out_channels": shapes.rows("audio_proj_out.weight"),
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": shapes.rows("audio_proj_in.weight") // 32,
        "audio_cross_attention_dim": shapes.columns("transformer_blocks.0.audio_attn2.to_k.weight"),
    }


LTX_2 = Family(
    name="LTX-2",
    model_classes=("LTX2VideoTransformer3DModel",),
    layers=(
        merged("transformer_blocks.{}.attn1", "to_qkv", QKV),
        *linears("transformer_blocks.{}.attn1", "to_out.0"),
        *(
            layer
            for attention in _UNMERGED
            for layer in linears(f"transformer_blocks.{{}}.{attention}", *QKV, "to_out.0")
        ),
        *linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        *linears("transformer_blocks.{}.audio_ff", "net.0.proj", "net.2"),
    ),
    method_notes=(
        MethodNote(
            ("svdquant_nvfp4",),
            "only vLLM-Omni 0.30.0 loads SVDQuant of LTX-2, since 0.32.0rc1 builds q, k and v apart",
            runtimes=(VLLM_OMNI,),
        ),
    ),
    original_names=(
        *renamed(
            {
                "patchify_proj": "proj_in",
                "audio_patchify_proj": "audio_proj_in",
                "adaln_single": "time_embed",
                "audio_adaln_single": "audio_time_embed",
                "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
                "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
                "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
                "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
            }
        ),
        *same("caption_projection", "audio_caption_projection", "proj_out", "audio_proj_out"),
        *same("scale_shift_table", "audio_scale_shift_table"),
        *same("video_embeddings_connector", "audio_embeddings_connector"),  # components of their own in diffusers
        *renamed(
            {
                "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
                "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
            },
            "transformer_blocks.{}.",
            "transformer_blocks.{}.",
        ),
        *same(*(f"transformer_blocks.{{}}.{part}" for part in ("ff", "audio_ff"))),
        *same(*(f"transformer_blocks.{{}}.{part}" for part in ("scale_shift_table", "audio_scale_shift_table"))),
        *(name for attention in ("attn1", *_UNMERGED) for name in _original_attention(attention)),
    ),
    gguf=_GGUF,
    config=(
        # Two types of rotary embeddings were published.
        ConfigRule(
            "LTX2VideoTransformer3DModel",
            ("audio_proj_in.weight", "time_embed.linear.weight"),
            _ltx_2_settings,
            {"rope_type": {}, "num_attention_heads": {"attention_head_dim": (128,)}},
            spare=("video_embeddings_connector.", "audio_embeddings_connector."),
        ),
    ),
)

LTX_VIDEO = Family(
    name="LTX-Video",
    model_classes=("LTXVideoTransformer3DModel",),
    refusals=unknown_scope("LTX-Video"),
    original_names=(
        *renamed({"patchify_proj": "proj_in", "adaln_single": "time_embed"}),
        *same("caption_projection", "proj_out", "scale_shift_table"),
        *same("transformer_blocks.{}.ff", "transformer_blocks.{}.scale_shift_table"),
        *(name for attention in ("attn1", "attn2") for name in _original_attention(attention)),
    ),
    gguf=replace(_GGUF, has_converter=True),
    config=(
        ConfigRule(
            "LTXVideoTransformer3DModel",
            ("proj_in.weight", "time_embed.linear.weight", "caption_projection.linear_1.weight"),
            _ltx_settings,
            {"num_attention_heads": {"attention_head_dim": (64, 128), "num_layers": (28, 48)}},
        ),
    ),
)
