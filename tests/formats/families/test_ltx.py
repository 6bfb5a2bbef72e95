"""LTX-2 against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable

CheckLayers = Callable[..., None]

QKV = ("to_q", "to_k", "to_v")
BLOCK = {
    "attn1.to_qkv": QKV,
    "attn1.to_out.0": (),
    **{
        f"{attention}.{leaf}": ()
        for attention in ("audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
        for leaf in (*QKV, "to_out.0")
    },
    **{f"{ff}.{leaf}": () for ff in ("ff", "audio_ff") for leaf in ("net.0.proj", "net.2")},
}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    check_layers(
        "LTX2VideoTransformer3DModel",
        {f"transformer_blocks.{number}": BLOCK for number in range(2)},
        never=(
            "transformer_blocks.0.attn1.to_gate_logits",
            "proj_in",
            "audio_proj_out",
            "caption_projection.linear_1",
            "time_embed.linear",
        ),
    )
