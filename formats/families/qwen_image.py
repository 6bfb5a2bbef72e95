"""Qwen-Image, with its Edit and Layered variants, which have the same transformer."""

from __future__ import annotations

from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes, rotary_axes
from omni_convert.formats.families.family import Family, GgufFacts, NunchakuFacts, Recommendation
from omni_convert.formats.families.layers import ADDED_QKV, DOUBLE_STREAM_ATTENTION, QKV, linears
from omni_convert.formats.families.original_names import joined

__all__ = ["QWEN_IMAGE"]

_INDEX_TIMESTEP_ZERO = "__index_timestep_zero__"


def _settings(shapes: Shapes) -> dict[str, Any]:
    inner, head = shapes.rows("img_in.weight"), shapes.rows("transformer_blocks.0.attn.norm_q.weight")
    is_layered = "time_text_embed.addition_t_embedding.weight" in shapes
    return {
        "patch_size": 2,
        "in_channels": shapes.columns("img_in.weight"),
        "out_channels": shapes.rows("proj_out.weight") // 4,
        "num_layers": shapes.count("transformer_blocks.{}.attn.norm_q.weight"),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": shapes.rows("txt_norm.weight"),
        "axes_dims_rope": rotary_axes(head),
        "zero_cond_t": _INDEX_TIMESTEP_ZERO in shapes,
        "use_additional_t_cond": is_layered,
        "use_layer3d_rope": is_layered,
    }


QWEN_IMAGE = Family(
    name="Qwen-Image",
    model_classes=("QwenImageTransformer2DModel",),
    layers=(
        *DOUBLE_STREAM_ATTENTION,
        *linears("transformer_blocks.{}.img_mlp", "net.0.proj", "net.2"),
        *linears("transformer_blocks.{}.txt_mlp", "net.0.proj", "net.2"),
    ),
    recommendations=(
        Recommendation(
            "img_mlp",
            "vLLM-Omni's guides disagree: the FP8 one keeps the image-stream MLPs in BF16 where quality regresses, "
            "because their inputs change over the denoising steps; the INT8 one quantizes every layer",
            methods=("fp8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4"),
        ),
    ),
    has_original_names=True,
    markers=(("zero_cond_t", _INDEX_TIMESTEP_ZERO),),
    gguf=GgufFacts("qwen_image", has_vllm_adapter=True),
    nunchaku=NunchakuFacts(
        "NunchakuQwenImageTransformer2DModel",
        (
            joined("transformer_blocks.{}.attn.to_qkv", "transformer_blocks.{}.attn", *QKV),
            joined("transformer_blocks.{}.attn.add_qkv_proj", "transformer_blocks.{}.attn", *ADDED_QKV),
        ),
        modulations=("transformer_blocks.{}.img_mod.1", "transformer_blocks.{}.txt_mod.1"),
        unsigned=("transformer_blocks.{}.img_mlp.net.2", "transformer_blocks.{}.txt_mlp.net.2"),
    ),
    config=(
        # Files from elsewhere than ComfyUI have no marker, whatever `zero_cond_t` is.
        ConfigRule(
            "QwenImageTransformer2DModel",
            ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
            _settings,
            {"axes_dims_rope": {"attention_head_dim": (128,)}, "zero_cond_t": {"zero_cond_t": (True,)}},
        ),
    ),
)
