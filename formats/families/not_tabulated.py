"""Families whose layers in vLLM-Omni are not known here: the generic rule chooses them for our own loader."""

from __future__ import annotations

from dataclasses import replace

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
    "HIDREAM_I1",
    "HUNYUAN_VIDEO",
    "LUMINA_2",
    "MINIMAX_H3",
    "SANA_WM",
]

_UNKNOWN = unknown_scope("this model")

HIDREAM_I1 = Family(
    "HiDream-I1",
    ("HiDreamImageTransformer2DModel",),
    refusals=_UNKNOWN,
    has_original_names=True,
    gguf=GgufFacts("hidream", kept_layers=("gate",), has_converter=True),
)
MINIMAX_H3 = Family("MiniMax-H3", ("MiniMaxH3Transformer3DModel",), refusals=_UNKNOWN)
SANA_WM = Family("SANA-WM", ("SanaWMTransformer3DModel",), refusals=_UNKNOWN)

AURA_FLOW = Family(
    "AuraFlow", ("AuraFlowTransformer2DModel",), refusals=_UNKNOWN, gguf=GgufFacts("aura", has_converter=True)
)
COSMOS = Family(
    "Cosmos", ("CosmosTransformer3DModel",), refusals=_UNKNOWN, gguf=GgufFacts("cosmos", has_converter=True)
)
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


LUMINA_2 = Family(
    "Lumina 2",
    ("Lumina2Transformer2DModel",),
    refusals=_UNKNOWN,
    original_names=(
        *same("x_embedder"),
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
)
