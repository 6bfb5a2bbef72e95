"""FLUX.1, and the original names that FLUX.2 kept of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes, rotary_axes
from omni_convert.formats.families.family import Family, GgufFacts, MethodNote, NunchakuFacts
from omni_convert.formats.families.layers import (
    ADDED_QKV,
    DIFFUSERS,
    QKV,
    VLLM_OMNI,
    WHOLE_BLOCK_RUNTIMES,
    linears,
    merged,
)
from omni_convert.formats.families.original_names import CutLayer, OriginalName, joined, renamed

__all__ = [
    "DOUBLE",
    "FLUX_1",
    "MLP_EMBEDDER",
    "ORIGINAL_DOUBLE",
    "ORIGINAL_DOUBLE_ATTENTION",
    "ORIGINAL_DOUBLE_MODULATION_AND_MLP",
    "ORIGINAL_EMBEDDERS",
    "ORIGINAL_MODULATION",
    "ORIGINAL_SINGLE",
    "ORIGINAL_SINGLE_NORMS",
    "SINGLE",
    "single_and_double",
]

ORIGINAL_DOUBLE, DOUBLE = "double_blocks.{}.", "transformer_blocks.{}."
ORIGINAL_SINGLE, SINGLE = "single_blocks.{}.", "single_transformer_blocks.{}."
MLP_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}

ORIGINAL_EMBEDDERS = renamed({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"})
ORIGINAL_DOUBLE_ATTENTION = (
    joined("double_blocks.{}.img_attn.qkv", "transformer_blocks.{}.attn", *QKV),
    joined("double_blocks.{}.txt_attn.qkv", "transformer_blocks.{}.attn", *ADDED_QKV),
    *renamed(
        {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
            "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
            "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
            "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
        },
        ORIGINAL_DOUBLE,
        DOUBLE,
    ),
)
ORIGINAL_DOUBLE_MODULATION_AND_MLP = renamed(
    {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    },
    ORIGINAL_DOUBLE,
    DOUBLE,
)
ORIGINAL_SINGLE_NORMS = renamed(
    {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
    ORIGINAL_SINGLE,
    SINGLE,
)
ORIGINAL_MODULATION = OriginalName("final_layer.adaLN_modulation.1", ("norm_out.linear",), turned="always")


def single_and_double(shapes: Shapes) -> dict[str, Any]:
    """Settings that FLUX.1, Chroma and FLUX.2 have in common."""
    inner, channels = shapes.rows("x_embedder.weight"), shapes.columns("x_embedder.weight")
    head = shapes.rows("transformer_blocks.0.attn.norm_q.weight")
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shapes.rows("proj_out.weight"),
        "num_layers": shapes.count("transformer_blocks.{}.attn.norm_q.weight"),
        "num_single_layers": shapes.count("single_transformer_blocks.{}.attn.norm_q.weight"),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": shapes.columns("context_embedder.weight"),
        "axes_dims_rope": rotary_axes(head),
    }


def _settings(shapes: Shapes) -> dict[str, Any]:
    return {
        **single_and_double(shapes),
        "pooled_projection_dim": shapes.columns("time_text_embed.text_embedder.linear_1.weight"),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


_DOUBLE_BLOCK = (
    merged("transformer_blocks.{}.attn", "to_qkv", QKV, loads_merged=False),
    merged("transformer_blocks.{}.attn", "add_kv_proj", ADDED_QKV, loads_merged=False),
    *linears("transformer_blocks.{}.attn", "to_out.0", "to_add_out"),
    *linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
    *linears("transformer_blocks.{}.ff_context", "net.0.proj", "net.2"),
)

FLUX_1 = Family(
    name="FLUX.1",
    model_classes=("FluxTransformer2DModel",),
    layers=(
        merged("single_transformer_blocks.{}.attn", "to_qkv", QKV, loads_merged=False),
        *linears("single_transformer_blocks.{}", "proj_mlp", "proj_out"),
        *(replace(layer, runtimes=WHOLE_BLOCK_RUNTIMES) for layer in _DOUBLE_BLOCK),
        # vLLM-Omni withholds all other configs from the double blocks (`safe_quant_config`).
        *(replace(layer, runtimes=(VLLM_OMNI,), dialects=("auto-round",)) for layer in _DOUBLE_BLOCK),
    ),
    method_notes=(
        MethodNote(
            ("fp8", "int8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4", "gguf"),
            "vLLM-Omni runs only the single blocks of FLUX.1 quantized, except with w4a16; --runtime diffusers "
            "quantizes the double blocks as well, for omni_convert.loaders alone",
            runtimes=(VLLM_OMNI, DIFFUSERS),
        ),
    ),
    original_names=(
        *ORIGINAL_EMBEDDERS,
        *renamed(MLP_EMBEDDER, "time_in.", "time_text_embed.timestep_embedder."),
        *renamed(MLP_EMBEDDER, "vector_in.", "time_text_embed.text_embedder."),
        *renamed(MLP_EMBEDDER, "guidance_in.", "time_text_embed.guidance_embedder."),
        *ORIGINAL_DOUBLE_ATTENTION,
        *ORIGINAL_DOUBLE_MODULATION_AND_MLP,
        joined(
            "single_blocks.{}.linear1", "single_transformer_blocks.{}", *(f"attn.{part}" for part in QKV), "proj_mlp"
        ),
        *renamed({"modulation.lin": "norm.linear", "linear2": "proj_out"}, ORIGINAL_SINGLE, SINGLE),
        *ORIGINAL_SINGLE_NORMS,
        ORIGINAL_MODULATION,
    ),
    # XLabs' trainer keeps its layers in attention processors; ComfyUI takes the first rows of `linear1` alone, too.
    trainer_names=(
        joined("double_blocks.{}.processor.qkv_lora1", "transformer_blocks.{}.attn", *QKV),
        joined("double_blocks.{}.processor.qkv_lora2", "transformer_blocks.{}.attn", *ADDED_QKV),
        joined("single_blocks.{}.processor.qkv_lora", "single_transformer_blocks.{}.attn", *QKV),
        joined("single_blocks.{}.linear1_qkv", "single_transformer_blocks.{}.attn", *QKV),
        *renamed(
            {"processor.proj_lora1": "attn.to_out.0", "processor.proj_lora2": "attn.to_add_out"},
            ORIGINAL_DOUBLE,
            DOUBLE,
        ),
        *renamed({"processor.proj_lora": "proj_out"}, ORIGINAL_SINGLE, SINGLE),
    ),
    gguf=GgufFacts("flux", has_converter=True),
    nunchaku=NunchakuFacts(
        "NunchakuFluxTransformer2dModel",
        (
            joined(f"{DOUBLE}qkv_proj", f"{DOUBLE}attn", *QKV),
            joined(f"{DOUBLE}qkv_proj_context", f"{DOUBLE}attn", *ADDED_QKV),
            joined(f"{SINGLE}qkv_proj", f"{SINGLE}attn", *QKV),
            *renamed(
                {
                    "out_proj": "attn.to_out.0",
                    "out_proj_context": "attn.to_add_out",
                    "mlp_fc1": "ff.net.0.proj",
                    "mlp_fc2": "ff.net.2",
                    "mlp_context_fc1": "ff_context.net.0.proj",
                    "mlp_context_fc2": "ff_context.net.2",
                    **{norm: f"attn.{norm}" for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")},
                },
                DOUBLE,
                DOUBLE,
            ),
            *renamed({"mlp_fc1": "proj_mlp", "norm_q": "attn.norm_q", "norm_k": "attn.norm_k"}, SINGLE, SINGLE),
        ),
        modulations=(f"{DOUBLE}norm1.linear", f"{DOUBLE}norm1_context.linear", f"{SINGLE}norm.linear"),
        unsigned=(f"{DOUBLE}mlp_fc2", f"{DOUBLE}mlp_context_fc2", f"{SINGLE}mlp_fc2"),
        cuts=(CutLayer(f"{SINGLE}proj_out", f"{SINGLE}out_proj", f"{SINGLE}mlp_fc2"),),
        uses_engine=True,
    ),
    config=(
        ConfigRule(
            "FluxTransformer2DModel",
            ("time_text_embed.text_embedder.linear_1.weight", "single_transformer_blocks.0.norm.linear.weight"),
            _settings,
            {"axes_dims_rope": {"attention_head_dim": (128,)}},
        ),
    ),
)
