"""HunyuanVideo-1.5 against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable

CheckLayers = Callable[..., None]

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE_STREAM = {"attn.to_qkv": QKV, "attn.add_kv_proj": ADDED, "attn.to_out.0": (), "attn.to_add_out": ()}
FEED_FORWARDS: dict[str, tuple[str, ...]] = {
    "ff.net.0.proj": (),
    "ff.net.2": (),
    "ff_context.net.0.proj": (),
    "ff_context.net.2": (),
}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    check_layers(
        "HunyuanVideo15Transformer3DModel",
        {f"transformer_blocks.{number}": DOUBLE_STREAM | FEED_FORWARDS for number in range(2)},
        never=(
            "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
            "context_embedder_2.linear_1",
            "image_embedder.linear_1",
            "time_embed.timestep_embedder.linear_1",
            "transformer_blocks.0.norm1.linear",
            "cond_type_embed",
            "proj_out",
        ),
    )
