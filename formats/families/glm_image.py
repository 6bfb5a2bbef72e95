"""GLM-Image's diffusion transformer."""

from __future__ import annotations

from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import QKV, kept, linears, merged

__all__ = ["GLM_IMAGE"]

_EMBEDS_CONDITION = "embedder: runs once per picture and feeds every block"

GLM_IMAGE = Family(
    name="GLM-Image",
    model_classes=("GlmImageTransformer2DModel",),
    layers=(
        merged("transformer_blocks.{}.attn1", "to_qkv", QKV, loads_merged=False),
        *linears("transformer_blocks.{}.attn1", "to_out.0"),
        *linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        kept("transformer_blocks.{}.norm1.linear", "modulation: its few outputs scale and shift whole layers"),
        kept("glyph_projector.net.0.proj", _EMBEDS_CONDITION),
        kept("glyph_projector.net.2", _EMBEDS_CONDITION),
        kept("prior_projector.net.0.proj", _EMBEDS_CONDITION),
        kept("prior_projector.net.2", _EMBEDS_CONDITION),
    ),
)
