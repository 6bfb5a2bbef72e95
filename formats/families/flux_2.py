"""FLUX.2: dev and klein."""

from __future__ import annotations

from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes
from omni_convert.formats.families.family import EncoderLayers, Family, GgufFacts
from omni_convert.formats.families.flux_1 import (
    DOUBLE,
    MLP_EMBEDDER,
    ORIGINAL_DOUBLE,
    ORIGINAL_DOUBLE_ATTENTION,
    ORIGINAL_EMBEDDERS,
    ORIGINAL_MODULATION,
    ORIGINAL_SINGLE,
    ORIGINAL_SINGLE_NORMS,
    SINGLE,
    single_and_double,
)
from omni_convert.formats.families.layers import DOUBLE_STREAM_ATTENTION, LayerPattern, linears, merged
from omni_convert.formats.families.original_names import renamed

__all__ = ["FLUX_2"]

_ENCODER = "language_model.model.layers.{}"


def _gate_up(stem: str) -> LayerPattern:
    """One tensor of two halves (gate, up) on disk, and two logical widths in the runtime."""
    return LayerPattern(stem, (stem,), is_fused=True)


def _settings(shapes: Shapes) -> dict[str, Any]:
    common = single_and_double(shapes)
    inner = common["attention_head_dim"] * common["num_attention_heads"]
    return {
        **common,
        "timestep_guidance_channels": shapes.columns("time_guidance_embed.timestep_embedder.linear_1.weight"),
        "mlp_ratio": shapes.columns("transformer_blocks.0.ff.linear_out.weight") / inner,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": [common["attention_head_dim"] // 4] * 4,
    }


FLUX_2 = Family(
    name="FLUX.2",
    model_classes=("Flux2Transformer2DModel",),
    layers=(
        *DOUBLE_STREAM_ATTENTION,
        _gate_up("transformer_blocks.{}.ff.linear_in"),
        *linears("transformer_blocks.{}.ff", "linear_out"),
        _gate_up("transformer_blocks.{}.ff_context.linear_in"),
        *linears("transformer_blocks.{}.ff_context", "linear_out"),
        *linears("single_transformer_blocks.{}.attn", "to_qkv_mlp_proj", "to_out"),
    ),
    # Only dev shares its encoder; the Qwen3 encoder of klein is a plain transformers module.
    shared_encoder=EncoderLayers(
        model_types=("mistral3", "mistral"),
        layers=(
            merged(f"{_ENCODER}.self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            *linears(f"{_ENCODER}.self_attn", "o_proj"),
            merged(f"{_ENCODER}.mlp", "gate_up_proj", ("gate_proj", "up_proj")),
            *linears(f"{_ENCODER}.mlp", "down_proj"),
        ),
        prefix="text_encoder.",
    ),
    original_names=(
        *ORIGINAL_EMBEDDERS,
        *renamed(MLP_EMBEDDER, "time_in.", "time_guidance_embed.timestep_embedder."),
        *renamed(MLP_EMBEDDER, "guidance_in.", "time_guidance_embed.guidance_embedder."),
        *renamed(
            {
                f"{stream}.lin": f"{stream}.linear"
                for stream in (
                    "double_stream_modulation_img",
                    "double_stream_modulation_txt",
                    "single_stream_modulation",
                )
            }
        ),
        *ORIGINAL_DOUBLE_ATTENTION,
        *renamed(
            {
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
            ORIGINAL_DOUBLE,
            DOUBLE,
        ),
        *renamed({"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}, ORIGINAL_SINGLE, SINGLE),
        *ORIGINAL_SINGLE_NORMS,
        ORIGINAL_MODULATION,
    ),
    gguf=GgufFacts(
        "flux",
        has_vllm_adapter=True,  # for klein alone, which the class does not tell
    ),
    config=(
        ConfigRule(
            "Flux2Transformer2DModel",
            ("double_stream_modulation_img.linear.weight", "single_stream_modulation.linear.weight"),
            _settings,
            {"axes_dims_rope": {"attention_head_dim": (128,)}},
        ),
    ),
)
