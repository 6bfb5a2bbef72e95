"""Krea 2.

Source: vLLM-Omni 0.30.0, `diffusion/models/krea2/krea2_transformer.py`. Every linear there is a ReplicatedLinear that
gets the config block and has diffusers' name; nothing is merged.
"""

from __future__ import annotations

from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import LayerPattern, kept, linears

__all__ = ["KREA_2"]

_BLOCK = {"attn": ("to_q", "to_k", "to_v", "to_gate", "to_out.0"), "ff": ("gate", "up", "down")}
_FUSES_TEXT = "text fusion: runs once per prompt and feeds every block"
_AT_THE_EDGE = "outside of the blocks: small, and every block depends on it"


def _fusion_block(block: str) -> tuple[LayerPattern, ...]:
    parent = f"text_fusion.{block}.{{}}"
    return tuple(kept(f"{parent}.{part}.{leaf}", _FUSES_TEXT) for part, leaves in _BLOCK.items() for leaf in leaves)


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
)
