"""Z-Image, and Ming-Image, whose transformer is Z-Image's under another name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes
from omni_convert.formats.families.family import (
    NOT_IN_DIFFUSERS,
    EncoderLayers,
    Family,
    GgufFacts,
    MethodNote,
    NunchakuFacts,
)
from omni_convert.formats.families.layers import (
    EVERY_RUNTIME,
    QKV,
    VLLM_OMNI,
    WHOLE_BLOCK_RUNTIMES,
    LayerPattern,
    linears,
    merged,
)
from omni_convert.formats.families.original_names import OriginalName, joined, renamed, same

__all__ = ["MING_IMAGE", "Z_IMAGE"]


def _block(block: str, runtimes: tuple[str, ...] = EVERY_RUNTIME) -> tuple[LayerPattern, ...]:
    return (
        merged(f"{block}.attention", "to_qkv", QKV, runtimes=runtimes),
        *linears(f"{block}.attention", "to_out.0", runtimes=runtimes),
        merged(f"{block}.feed_forward", "w13", ("w1", "w3"), loads_merged=False, runtimes=runtimes),
        *linears(f"{block}.feed_forward", "w2", runtimes=runtimes),
    )


def _original_block(block: str) -> tuple[OriginalName, ...]:
    names = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
    attention = f"{block}.{{}}.attention"
    rest = ("feed_forward", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation")
    return (
        joined(f"{attention}.qkv", attention, *QKV),
        *renamed(names, f"{attention}.", f"{attention}."),
        *same(*(f"{block}.{{}}.{part}" for part in rest)),
    )


def _nunchaku_block(block: str) -> tuple[OriginalName, ...]:
    attention, mlp = f"{block}.{{}}.attention", f"{block}.{{}}.feed_forward"
    return (
        joined(f"{attention}.to_qkv", attention, *QKV),
        joined(f"{mlp}.net.0.proj", mlp, "w3", "w1"),  # as diffusers' SwiGLU, whose second half is the gate
        *renamed({"net.2": "w2"}, f"{mlp}.", f"{mlp}."),
    )


def _settings(shapes: Shapes) -> dict[str, Any]:
    dim, head = shapes.rows("all_x_embedder.2-1.weight"), shapes.rows("layers.0.attention.norm_q.weight")
    rows = shapes.rows("layers.0.attention.to_k.weight")  # of q, k and v where the file joins them
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": shapes.columns("all_x_embedder.2-1.weight") // 4,
        "dim": dim,
        "n_layers": shapes.count("layers.{}.attention.norm_q.weight"),
        "n_refiner_layers": shapes.count("noise_refiner.{}.attention.norm_q.weight"),
        "n_heads": dim // head,
        "n_kv_heads": (rows if rows <= dim else (rows - dim) // 2) // head,
        "cap_feat_dim": shapes.rows("cap_embedder.0.weight"),
        "siglip_feat_dim": shapes.rows("siglip_embedder.0.weight") if "siglip_embedder.0.weight" in shapes else None,
        "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
    }


Z_IMAGE = Family(
    name="Z-Image",
    model_classes=("ZImageTransformer2DModel",),
    layers=(
        *_block("noise_refiner.{}"),
        *_block("context_refiner.{}"),
        *_block("siglip_refiner.{}", WHOLE_BLOCK_RUNTIMES),  # only in models that also see pictures
        *_block("layers.{}"),
    ),
    method_notes=(
        MethodNote(
            ("fp8",),
            "vLLM-Omni's own FP8 quality gate for Z-Image-Turbo keeps the last 15 of its 30 layers in BF16; "
            "for that: --ignored-layers 'layers.1[5-9].*' --ignored-layers 'layers.2?.*'",
            layer="layers.29.attention.to_q",
        ),
    ),
    shared_encoder=EncoderLayers(
        model_types=(),
        layers=(
            *linears("model.layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            *linears("model.layers.{}.mlp", "gate_proj", "up_proj", "down_proj"),
            LayerPattern("lm_head", ("lm_head",)),
        ),
    ),
    original_names=(
        *renamed({"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}),
        *same("norm_final"),  # which is unused
        *same("t_embedder", "cap_embedder", "siglip_embedder", "x_pad_token", "cap_pad_token", "siglip_pad_token"),
        *(
            name
            for block in ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
            for name in _original_block(block)
        ),
    ),
    gguf=GgufFacts(
        "lumina2",
        kept_layers=("noise_refiner", "context_refiner"),
        has_vllm_adapter=True,
        has_converter=True,
    ),
    nunchaku=NunchakuFacts(
        "NunchakuZImageTransformer2DModel",
        tuple(name for block in ("layers", "noise_refiner", "context_refiner") for name in _nunchaku_block(block)),
    ),
    config=(
        ConfigRule(
            "ZImageTransformer2DModel",
            ("all_x_embedder.2-1.weight", "cap_pad_token"),
            _settings,
            {"axes_dims": {"dim": (3840,), "n_heads": (30,)}},
            spare=("norm_final.",),
        ),
    ),
)

# vLLM-Omni's `MingImageTransformer2DModel` inherits all layers and their loading. What makes its conditions is loaded
# in full precision.
MING_IMAGE = replace(
    Z_IMAGE,
    name="Ming-Image",
    model_classes=("DiffusionTransformer",),
    layers=tuple(layer for layer in Z_IMAGE.layers if VLLM_OMNI in layer.runtimes),
    method_notes=(),
    shared_encoder=None,
    refusals=(NOT_IN_DIFFUSERS,),
    original_names=(),
    gguf=GgufFacts(),
    nunchaku=None,
    config=(),
)
