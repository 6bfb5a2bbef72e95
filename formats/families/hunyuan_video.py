"""HunyuanVideo-1.5."""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts
from omni_convert.formats.families.layers import DOUBLE_STREAM_ATTENTION, linears

__all__ = ["HUNYUAN_VIDEO_15"]

HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo-1.5",
    model_classes=("HunyuanVideo15Transformer3DModel",),
    layers=(
        *DOUBLE_STREAM_ATTENTION,
        *linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        *linears("transformer_blocks.{}.ff_context", "net.0.proj", "net.2"),
    ),
    gguf=GgufFacts("hyvid", diffusers_prefixes=("context_embedder.",)),
)
