"""Krea 2.

Source: vLLM-Omni 0.30.0, `diffusion/models/krea2/krea2_transformer.py`. Every linear there is a ReplicatedLinear that
gets the config block and has diffusers' name; nothing is merged.
"""

from __future__ import annotations

from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes
from omni_convert.formats.families.family import Family, GgufFacts
from omni_convert.formats.families.layers import LayerPattern, kept, linears
from omni_convert.formats.families.original_names import OriginalName, renamed

__all__ = ["KREA_2"]

_BLOCK = {"attn": ("to_q", "to_k", "to_v", "to_gate", "to_out.0"), "ff": ("gate", "up", "down")}
_FUSES_TEXT = "text fusion: runs once per prompt and feeds every block"
_AT_THE_EDGE = "outside of the blocks: small, and every block depends on it"


def _fusion_block(block: str) -> tuple[LayerPattern, ...]:
    parent = f"text_fusion.{block}.{{}}"
    return tuple(kept(f"{parent}.{part}.{leaf}", _FUSES_TEXT) for part, leaves in _BLOCK.items() for leaf in leaves)


def _original_block(original: str, name: str) -> tuple[OriginalName, ...]:
    return renamed(
        {
            "attn.wq": "attn.to_q",
            "attn.wk": "attn.to_k",
            "attn.wv": "attn.to_v",
            "attn.wo": "attn.to_out.0",
            "attn.gate": "attn.to_gate",
            "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
            "attn.qknorm.knorm.scale": "attn.norm_k.weight",
            "mlp": "ff",
            "prenorm.scale": "norm1.weight",
            "postnorm.scale": "norm2.weight",
        },
        f"{original}.{{}}.",
        f"{name}.{{}}.",
    )


def _settings(shapes: Shapes) -> dict[str, Any]:
    inner, head = shapes.rows("img_in.weight"), shapes.rows("transformer_blocks.0.attn.norm_q.weight")
    text = "text_fusion.layerwise_blocks.0"
    text_head = shapes.rows(f"{text}.attn.norm_q.weight")
    return {
        "in_channels": shapes.columns("img_in.weight"),
        "num_layers": shapes.count("transformer_blocks.{}.attn.norm_q.weight"),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "num_key_value_heads": shapes.rows("transformer_blocks.0.attn.to_k.weight") // head,
        "intermediate_size": shapes.rows("transformer_blocks.0.ff.up.weight"),
        "timestep_embed_dim": shapes.columns("time_embed.linear_1.weight"),
        "text_hidden_dim": shapes.rows(f"{text}.norm1.weight"),
        "num_text_layers": shapes.columns("text_fusion.projector.weight"),
        "text_num_attention_heads": shapes.rows(f"{text}.attn.to_q.weight") // text_head,
        "text_num_key_value_heads": shapes.rows(f"{text}.attn.to_k.weight") // text_head,
        "text_intermediate_size": shapes.rows(f"{text}.ff.up.weight"),
        "num_layerwise_text_blocks": shapes.count("text_fusion.layerwise_blocks.{}.norm1.weight"),
        "num_refiner_text_blocks": shapes.count("text_fusion.refiner_blocks.{}.norm1.weight"),
        "axes_dims_rope": [head // 4, 3 * head // 8, 3 * head // 8],
    }


KREA_2 = Family(
    name="Krea 2",
    model_classes=("Krea2Transformer2DModel",),
    layers=(
        *(layer for part, leaves in _BLOCK.items() for layer in linears(f"transformer_blocks.{{}}.{part}", *leaves)),
        *_fusion_block("layerwise_blocks"),
        *_fusion_block("refiner_blocks"),
        kept("text_fusion.projector", _FUSES_TEXT),
        *(
            kept(stem, _AT_THE_EDGE)
            for stem in (
                "img_in",
                "time_embed.linear_1",
                "time_embed.linear_2",
                "time_mod_proj",
                "txt_in.linear_1",
                "txt_in.linear_2",
                "final_layer.linear",
            )
        ),
    ),
    original_names=(
        *renamed(
            {
                "first": "img_in",
                "tmlp.0": "time_embed.linear_1",
                "tmlp.2": "time_embed.linear_2",
                "tproj.1": "time_mod_proj",
                "txtmlp.0.scale": "txt_in.norm.weight",
                "txtmlp.1": "txt_in.linear_1",
                "txtmlp.3": "txt_in.linear_2",
                "txtfusion.projector": "text_fusion.projector",
                "last.linear": "final_layer.linear",
                "last.norm.scale": "final_layer.norm.weight",
                "last.modulation.lin": "final_layer.scale_shift_table",
            }
        ),
        *_original_block("blocks", "transformer_blocks"),
        OriginalName("blocks.{}.mod.lin", ("transformer_blocks.{}.scale_shift_table",), shape=(-1,)),
        *_original_block("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
        *_original_block("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
    ),
    gguf=GgufFacts("krea2"),
    config=(
        ConfigRule(
            "Krea2Transformer2DModel",
            ("text_fusion.projector.weight", "transformer_blocks.0.attn.to_gate.weight"),
            _settings,
            {"axes_dims_rope": {"attention_head_dim": (128,)}},
        ),
    ),
)
