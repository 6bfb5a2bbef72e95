"""HunyuanVideo-1.5, and the original names that it shares with HunyuanVideo.

Source of the names: diffusers' conversions, `scripts/convert_hunyuan_video1_5_to_diffusers.py` and
`convert_hunyuan_video_transformer_to_diffusers`.
"""

from __future__ import annotations

from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes, rotary_axes
from omni_convert.formats.families.family import Family, GgufFacts
from omni_convert.formats.families.flux_1 import (
    DOUBLE,
    ORIGINAL_DOUBLE,
    ORIGINAL_DOUBLE_ATTENTION,
    ORIGINAL_DOUBLE_MODULATION_AND_MLP,
    ORIGINAL_MODULATION,
)
from omni_convert.formats.families.layers import ADDED_QKV, DOUBLE_STREAM_ATTENTION, QKV, linears
from omni_convert.formats.families.original_names import joined, renamed

__all__ = ["HUNYUAN_VIDEO_15", "ORIGINAL_DOUBLE_BLOCK", "ORIGINAL_JOINED_ATTENTION", "ORIGINAL_TEXT", "TRAINER_NAMES"]

_REFINER, _ORIGINAL_REFINER = (
    "context_embedder.token_refiner.refiner_blocks.{}.",
    "txt_in.individual_token_refiner.blocks.{}.",
)

ORIGINAL_TEXT = (
    *renamed(
        {
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "c_embedder": "time_text_embed.text_embedder",
            "input_embedder": "proj_in",
        },
        "txt_in.",
        "context_embedder.",
    ),
    joined(f"{_ORIGINAL_REFINER}self_attn_qkv", f"{_REFINER}attn", *QKV),
    *renamed(
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
        _ORIGINAL_REFINER,
        _REFINER,
    ),
)
ORIGINAL_DOUBLE_BLOCK = renamed(
    {
        "img_mod.linear": "norm1.linear",
        "txt_mod.linear": "norm1_context.linear",
        "img_attn_q_norm": "attn.norm_q",
        "img_attn_k_norm": "attn.norm_k",
        "txt_attn_q_norm": "attn.norm_added_q",
        "txt_attn_k_norm": "attn.norm_added_k",
        "img_attn_proj": "attn.to_out.0",
        "txt_attn_proj": "attn.to_add_out",
        "img_mlp.fc1": "ff.net.0.proj",
        "img_mlp.fc2": "ff.net.2",
        "txt_mlp.fc1": "ff_context.net.0.proj",
        "txt_mlp.fc2": "ff_context.net.2",
    },
    ORIGINAL_DOUBLE,
    DOUBLE,
)
ORIGINAL_JOINED_ATTENTION = (
    joined("double_blocks.{}.img_attn_qkv", "transformer_blocks.{}.attn", *QKV),
    joined("double_blocks.{}.txt_attn_qkv", "transformer_blocks.{}.attn", *ADDED_QKV),
)
# ComfyUI calls the blocks of HunyuanVideo what it calls those of FLUX.1, and so do trainers that build on it.
TRAINER_NAMES = (
    *ORIGINAL_JOINED_ATTENTION,
    *ORIGINAL_DOUBLE_ATTENTION,
    *ORIGINAL_DOUBLE_MODULATION_AND_MLP,
)


def _settings(shapes: Shapes) -> dict[str, Any]:
    inner, channels, frames, patch, _ = shapes.find("x_embedder.proj.weight") or (0, 0, 1, 1, 1)
    head = shapes.rows("transformer_blocks.0.attn.norm_q.weight")
    return {
        "in_channels": channels,
        "out_channels": shapes.rows("proj_out.weight") // (frames * patch**2),
        "num_attention_heads": inner // head,
        "attention_head_dim": head,
        "num_layers": shapes.count("transformer_blocks.{}.attn.norm_q.weight"),
        "num_refiner_layers": shapes.count("context_embedder.token_refiner.refiner_blocks.{}.norm1.weight"),
        "mlp_ratio": shapes.rows("transformer_blocks.0.ff.net.0.proj.weight") / inner,
        "patch_size": patch,
        "patch_size_t": frames,
        "text_embed_dim": shapes.columns("context_embedder.proj_in.weight"),
        "text_embed_2_dim": shapes.columns("context_embedder_2.linear_1.weight"),
        "image_embed_dim": shapes.columns("image_embedder.linear_1.weight"),
        "rope_axes_dim": rotary_axes(head),
    }


HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo-1.5",
    model_classes=("HunyuanVideo15Transformer3DModel",),
    layers=(
        *DOUBLE_STREAM_ATTENTION,
        *linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        *linears("transformer_blocks.{}.ff_context", "net.0.proj", "net.2"),
    ),
    original_names=(
        *renamed(
            {
                "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
                "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
                "img_in.proj": "x_embedder.proj",
                "cond_type_embedding": "cond_type_embed",
                "byt5_in.layernorm": "context_embedder_2.norm",
                "byt5_in.fc1": "context_embedder_2.linear_1",
                "byt5_in.fc2": "context_embedder_2.linear_2",
                "byt5_in.fc3": "context_embedder_2.linear_3",
                "vision_in.proj.0": "image_embedder.norm_in",
                "vision_in.proj.1": "image_embedder.linear_1",
                "vision_in.proj.3": "image_embedder.linear_2",
                "vision_in.proj.4": "image_embedder.norm_out",
                "final_layer.linear": "proj_out",
            }
        ),
        *ORIGINAL_TEXT,
        *renamed({f"img_attn_{part[-1]}": f"attn.{part}" for part in QKV}, ORIGINAL_DOUBLE, DOUBLE),
        *renamed({f"txt_attn_{part[4]}": f"attn.{part}" for part in ADDED_QKV}, ORIGINAL_DOUBLE, DOUBLE),
        *ORIGINAL_DOUBLE_BLOCK,
        ORIGINAL_MODULATION,
    ),
    comfyui_names=ORIGINAL_JOINED_ATTENTION,  # ComfyUI builds it as HunyuanVideo
    trainer_names=TRAINER_NAMES,
    gguf=GgufFacts("hyvid"),
    config=(
        ConfigRule(
            "HunyuanVideo15Transformer3DModel",
            ("cond_type_embed.weight", "context_embedder_2.linear_1.weight", "image_embedder.linear_1.weight"),
            _settings,
            {"rope_axes_dim": {"attention_head_dim": (128,)}, "task_type": {}, "target_size": {}},
        ),
    ),
)
