"""LTX-Video and LTX-2."""

from __future__ import annotations

from dataclasses import replace

from omni_convert.formats.families.family import Family, GgufFacts, unknown_scope
from omni_convert.formats.families.layers import QKV, linears, merged
from omni_convert.formats.families.original_names import renamed, same

__all__ = ["LTX_2", "LTX_VIDEO"]

_GGUF = GgufFacts("ltxv", diffusers_prefixes=("time_embed.", "proj_in."))
_UNMERGED = ("audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

LTX_2 = Family(
    name="LTX-2",
    model_classes=("LTX2VideoTransformer3DModel",),
    layers=(
        merged("transformer_blocks.{}.attn1", "to_qkv", QKV),
        *linears("transformer_blocks.{}.attn1", "to_out.0"),
        *(
            layer
            for attention in _UNMERGED
            for layer in linears(f"transformer_blocks.{{}}.{attention}", *QKV, "to_out.0")
        ),
        *linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        *linears("transformer_blocks.{}.audio_ff", "net.0.proj", "net.2"),
    ),
    gguf=_GGUF,
)

LTX_VIDEO = Family(
    name="LTX-Video",
    model_classes=("LTXVideoTransformer3DModel",),
    refusals=unknown_scope("LTX-Video"),
    original_names=(
        *renamed({"patchify_proj": "proj_in", "adaln_single": "time_embed"}),
        *same("caption_projection", "proj_out", "scale_shift_table"),
        *same("transformer_blocks.{}.ff", "transformer_blocks.{}.scale_shift_table"),
        *(
            name
            for attention in ("transformer_blocks.{}.attn1.", "transformer_blocks.{}.attn2.")
            for name in (
                *renamed({"q_norm": "norm_q", "k_norm": "norm_k"}, attention, attention),
                *same(*(attention + part for part in (*QKV, "to_out"))),
            )
        ),
    ),
    gguf=replace(_GGUF, has_converter=True),
)
