"""Families of which nothing may be stored quantized for vLLM-Omni, 0.30.0 and 0.32.0rc1 alike."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes
from omni_convert.formats.families.family import NOT_IN_DIFFUSERS, Family, GgufFacts, RuntimeRefusal
from omni_convert.formats.families.flux_1 import FLUX_1, ORIGINAL_MODULATION, single_and_double
from omni_convert.formats.families.layers import ADDED_QKV, QKV, VLLM_OMNI
from omni_convert.formats.families.original_names import OriginalName, joined, renamed, same
from omni_convert.formats.families.wan import PUBLISHED, WAN, wan_settings

__all__ = [
    "CHROMA",
    "ERNIE_IMAGE",
    "HELIOS",
    "HIDREAM_I1",
    "HUNYUAN_IMAGE_21",
    "KANDINSKY_5",
    "KANDINSKY_6",
    "KANDINSKY_6_SR",
    "LONGCAT_IMAGE",
    "OVIS_IMAGE",
    "SANA_VIDEO",
    "SD_3",
    "WAN_ANIMATE",
    "WAN_ANIMATE_2",
    "WAN_S2V",
]

_IN_FULL_PRECISION = (
    RuntimeRefusal(
        VLLM_OMNI,
        "vLLM-Omni 0.30.0 and 0.32.0rc1 build every layer of this model in full precision",
        is_final=True,
    ),
)
# helios_transformer.py and ernie_image_transformer.py pass `quant_config` to their linears, and no `prefix`.
_WITHOUT_NAMES = (
    RuntimeRefusal(
        VLLM_OMNI,
        "vLLM-Omni 0.30.0 and 0.32.0rc1 build this model's linears without names, so that no layer could be left in "
        "BF16",
        is_final=True,
    ),
)

_WITHOUT_CLASS = (
    RuntimeRefusal(VLLM_OMNI, "neither vLLM-Omni 0.30.0 nor 0.32.0rc1 has a class for this model", is_final=True),
)


def _chroma_settings(shapes: Shapes) -> dict[str, Any]:
    guidance = "distilled_guidance_layer"
    return {
        **single_and_double(shapes),
        "approximator_num_channels": shapes.columns(f"{guidance}.in_proj.weight"),
        "approximator_hidden_dim": shapes.rows(f"{guidance}.in_proj.weight"),
        "approximator_layers": shapes.count(f"{guidance}.layers.{{}}.linear_1.weight"),
    }


CHROMA = Family(
    "Chroma",
    ("ChromaTransformer2DModel",),
    refusals=_WITHOUT_CLASS,
    original_names=(
        *FLUX_1.original_names,  # of which Chroma lacks the modulation
        *same("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
        *renamed(
            {
                "layers.{}.in_layer": "layers.{}.linear_1",
                "layers.{}.out_layer": "layers.{}.linear_2",
                "norms.{}.scale": "norms.{}.weight",
            },
            "distilled_guidance_layer.",
            "distilled_guidance_layer.",
        ),
    ),
    trainer_names=FLUX_1.trainer_names,
    gguf=GgufFacts("flux"),  # whose readers tell Chroma by its tensors,
    config=(
        ConfigRule(
            "ChromaTransformer2DModel",
            ("distilled_guidance_layer.in_proj.weight", "x_embedder.weight"),
            _chroma_settings,
            {"axes_dims_rope": {"attention_head_dim": (128,)}},
        ),
    ),
)


def _hidream_settings(shapes: Shapes) -> dict[str, Any]:
    inner = shapes.rows("x_embedder.proj.weight")
    captions = shapes.count("caption_projection.{}.linear.weight")
    return {
        "patch_size": 2,
        "in_channels": shapes.columns("x_embedder.proj.weight") // 4,
        "out_channels": shapes.rows("final_layer.linear.weight") // 4,
        "num_layers": shapes.count("double_stream_blocks.{}.block.attn1.to_q.weight"),
        "num_single_layers": shapes.count("single_stream_blocks.{}.block.attn1.to_q.weight"),
        "attention_head_dim": 128,
        "num_attention_heads": inner // 128,
        "caption_channels": [shapes.columns(f"caption_projection.{n}.linear.weight") for n in (captions - 1, 0)],
        "text_emb_dim": shapes.columns("p_embedder.pooled_embedder.linear_1.weight"),
        "num_routed_experts": shapes.count("double_stream_blocks.0.block.ff_i.experts.{}.w1.weight"),
        "num_activated_experts": 2,
        "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128],
        "llama_layers": [*range(32), *[31] * (captions - 33)],
    }


# Its class in 0.30.0 takes a config block, and passes it to no layer.
HIDREAM_I1 = Family(
    "HiDream-I1",
    ("HiDreamImageTransformer2DModel",),
    refusals=(
        RuntimeRefusal(
            VLLM_OMNI,
            "vLLM-Omni 0.30.0 builds every layer of this model in full precision, and 0.32.0rc1 has no class for it",
            is_final=True,
        ),
    ),
    has_original_names=True,
    gguf=GgufFacts("hidream", kept_layers=("gate",), has_converter=True),
    config=(
        ConfigRule(
            "HiDreamImageTransformer2DModel",
            ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight"),
            _hidream_settings,
            {
                key: {"num_attention_heads": (20,), "num_layers": (16,), "num_single_layers": (32,)}
                for key in ("num_activated_experts", "axes_dims_rope", "max_resolution", "llama_layers")
            },
        ),
    ),
)
KANDINSKY_5 = Family("Kandinsky 5", ("Kandinsky5Transformer3DModel",), refusals=_WITHOUT_CLASS)
# kandinsky6_transformer.py calls layers `self_attention`, `feed_forward.in_layer` and `time_embeddings.in_layer`,
# which are `attn`, `feed_forward.net.0.proj` and `time_embeddings.timestep_embedder.linear_1` in diffusers; nothing
# maps them. Its pipeline rounds every scale to BF16.
KANDINSKY_6 = Family(
    "Kandinsky 6",
    ("Kandinsky6Transformer3DModel",),
    refusals=(
        RuntimeRefusal(
            VLLM_OMNI,
            "vLLM-Omni 0.32.0rc1 does not load this model under the names that diffusers gives its layers, and 0.30.0 "
            "has no class for it",
            is_final=True,
        ),
    ),
)
KANDINSKY_6_SR = Family("Kandinsky 6 SR", ("Kandinsky6SRTransformer3DModel",), refusals=_WITHOUT_CLASS)
# wan2_2_s2v_transformer.py reads this model of Wan's own code, and hands `quant_config` to none of its linears.
WAN_S2V = Family(
    "Wan-S2V",
    ("WanModel_S2V",),
    refusals=(*(replace(each, is_loaded_here=False) for each in _IN_FULL_PRECISION), NOT_IN_DIFFUSERS),
)
WAN_ANIMATE_2 = Family("Wan-Animate 2", ("WanAnimate2Transformer3DModel",), refusals=_WITHOUT_CLASS)
HUNYUAN_IMAGE_21 = Family("HunyuanImage-2.1", ("HunyuanImageTransformer2DModel",), refusals=_WITHOUT_CLASS)


def _original_motion_encoder() -> tuple[OriginalName, ...]:
    """Names in the motion encoder, whose biases of activations have the shape of their inputs."""
    ours, theirs = "motion_encoder.", "motion_encoder.enc.net_app.convs."
    modules = {"0.0": "conv_in", "8": "conv_out"}
    biases = {"0.1.bias": "conv_in.act_fn.bias"}
    for block in range(7):
        name, number = f"res_blocks.{block}", block + 1
        modules |= {f"{number}.conv1.0": f"{name}.conv1", f"{number}.conv2.1": f"{name}.conv2"}
        modules |= {f"{number}.skip.1": f"{name}.conv_skip"}
        biases |= {f"{number}.conv1.1.bias": f"{name}.conv1.act_fn.bias"}
        biases |= {f"{number}.conv2.2.bias": f"{name}.conv2.act_fn.bias"}
    return (
        *(OriginalName(theirs + key, (ours + name,), shape=(1, -1, 1, 1)) for key, name in biases.items()),
        *renamed(modules, theirs, ours),
        *renamed({"enc.fc": "motion_network", "dec.direction.weight": "motion_synthesis_weight"}, ours, ours),
    )


WAN_ANIMATE = Family(
    "Wan-Animate",
    ("WanAnimateTransformer3DModel",),
    refusals=_WITHOUT_CLASS,
    original_names=(
        *WAN.original_names,
        *_original_motion_encoder(),
        *same("pose_patch_embedding", "face_encoder.out_proj", "face_encoder.padding_tokens"),
        *renamed(
            {f"{part}.conv": part for part in ("conv1_local", "conv2", "conv3")}, "face_encoder.", "face_encoder."
        ),
        joined("face_adapter.fuser_blocks.{}.linear1_kv", "face_adapter.{}", "to_k", "to_v"),
        *renamed(
            {"linear1_q": "to_q", "linear2": "to_out", "q_norm": "norm_q", "k_norm": "norm_k"},
            "face_adapter.fuser_blocks.{}.",
            "face_adapter.{}.",
        ),
    ),
    gguf=GgufFacts("wan", kept_layers=("condition_embedder",)),
    # All published models have the same encoders of motion and face.
    config=(
        ConfigRule(
            "WanAnimateTransformer3DModel",
            ("condition_embedder.time_proj.weight", "face_encoder.out_proj.weight", "motion_encoder.conv_in.weight"),
            wan_settings,
            {"num_attention_heads": PUBLISHED},
        ),
    ),
)


def _joint_block(stream: str, attention: str, projections: tuple[str, ...], norms: str) -> tuple[OriginalName, ...]:
    """Names in the image's or the text's half of a block of Stable Diffusion 3."""
    ours, theirs = "transformer_blocks.{}.attn", f"joint_blocks.{{}}.{stream}.attn"
    return (
        joined(f"{theirs}.qkv", ours, *projections),
        *renamed({"proj": attention, "ln_q": f"{norms}q", "ln_k": f"{norms}k"}, f"{theirs}.", f"{ours}."),
    )


def _sd_3_settings(shapes: Shapes) -> dict[str, Any]:
    inner, head = shapes.rows("pos_embed.proj.weight"), shapes.find("transformer_blocks.0.attn.norm_q.weight")
    blocks = shapes.count("transformer_blocks.{}.norm1.linear.weight")
    _, channels, patch, _ = shapes.find("pos_embed.proj.weight") or (0, 0, 1, 1)
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": blocks,
        "attention_head_dim": head[0] if head is not None else 64,
        "num_attention_heads": inner // (head[0] if head is not None else 64),
        "joint_attention_dim": shapes.columns("context_embedder.weight"),
        "caption_projection_dim": shapes.rows("context_embedder.weight"),
        "pooled_projection_dim": shapes.columns("time_text_embed.text_embedder.linear_1.weight"),
        "out_channels": shapes.rows("proj_out.weight") // patch**2,
        "pos_embed_max_size": math.isqrt(shapes.columns("pos_embed.pos_embed")),
        "dual_attention_layers": shapes.numbers("transformer_blocks.{}.attn2.to_q.weight", blocks),
        "qk_norm": "rms_norm" if head is not None else None,
    }


SD_3 = Family(
    "Stable Diffusion 3",
    ("SD3Transformer2DModel",),
    refusals=_IN_FULL_PRECISION,
    original_names=(
        *renamed(
            {
                "pos_embed": "pos_embed.pos_embed",
                "x_embedder.proj": "pos_embed.proj",
                "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
                "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
                "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
                "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
                "final_layer.linear": "proj_out",
            }
        ),
        *same("context_embedder"),
        *_joint_block("x_block", "to_out.0", QKV, "norm_"),
        *_joint_block("context_block", "to_add_out", ADDED_QKV, "norm_added_"),
        joined("joint_blocks.{}.x_block.attn2.qkv", "transformer_blocks.{}.attn2", *QKV),
        *renamed(
            {
                "x_block.attn2.proj": "attn2.to_out.0",
                "x_block.attn2.ln_q": "attn2.norm_q",
                "x_block.attn2.ln_k": "attn2.norm_k",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
            },
            "joint_blocks.{}.",
            "transformer_blocks.{}.",
        ),
        # In the last block it is scale and shift of the norm after which the text is dropped.
        OriginalName(
            "joint_blocks.{}.context_block.adaLN_modulation.1",
            ("transformer_blocks.{}.norm1_context.linear",),
            turned="alone",
        ),
        ORIGINAL_MODULATION,
    ),
    gguf=GgufFacts("sd3", has_converter=True),
    config=(
        # All published models have this `sample_size`; heads without norms have 64 channels.
        ConfigRule(
            "SD3Transformer2DModel",
            ("pos_embed.pos_embed", "transformer_blocks.0.attn.add_q_proj.weight"),
            _sd_3_settings,
            {"sample_size": {"pos_embed_max_size": (192, 384)}},
        ),
    ),
)
LONGCAT_IMAGE = Family("LongCat-Image", ("LongCatImageTransformer2DModel",), refusals=_IN_FULL_PRECISION)
OVIS_IMAGE = Family("Ovis-Image", ("OvisImageTransformer2DModel",), refusals=_IN_FULL_PRECISION)
SANA_VIDEO = Family("SANA-Video", ("SanaVideoTransformer3DModel",), refusals=_IN_FULL_PRECISION)
HELIOS = Family("Helios", ("HeliosTransformer3DModel",), refusals=_WITHOUT_NAMES)
ERNIE_IMAGE = Family("ERNIE-Image", ("ErnieImageTransformer2DModel",), refusals=_WITHOUT_NAMES, has_original_names=True)
