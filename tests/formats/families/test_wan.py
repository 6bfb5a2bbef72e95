"""Wan against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable

from omni_convert.formats.families.wan import WAN

CheckLayers = Callable[..., None]

QKV = ("to_q", "to_k", "to_v")
BLOCK = {
    "attn1.to_qkv": QKV,
    "attn1.to_out": ("to_out.0",),
    "attn2.to_q": (),
    "attn2.to_k": (),
    "attn2.to_v": (),
    "attn2.to_out": ("to_out.0",),
    "ffn.net_0.proj": ("net.0.proj",),
    "ffn.net_2": ("net.2",),
}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    block = BLOCK | {"attn2.add_k_proj": (), "attn2.add_v_proj": ()}
    check_layers(
        "WanTransformer3DModel",
        {f"blocks.{number}": block for number in range(2)},
        never=(
            "condition_embedder.time_proj",
            "condition_embedder.text_embedder.linear_1",
            "condition_embedder.image_embedder.ff.net.0.proj",
            "patch_embedding",
            "proj_out",
        ),
    )


def test_layers_of_vace(check_layers: CheckLayers) -> None:
    check_layers(
        "WanVACETransformer3DModel",
        {f"{block}.{number}": BLOCK for block in ("blocks", "vace_blocks") for number in range(2)},
        never=("vace_blocks.0.proj_in", "vace_blocks.1.proj_out", "vace_patch_embedding"),
    )


def test_modelopt_blocks_are_refused_and_nothing_else() -> None:
    assert "fp8" in str(WAN.refusal("vllm-omni", "nvfp4", "vllm-omni"))
    assert "auto-round" in str(WAN.refusal("vllm-omni", "nvfp4", "modelopt"))
    assert WAN.refusal("vllm-omni", "nvfp4", "auto-round") is None
    assert "--dialect vllm-omni" in str(WAN.refusal("vllm-omni", "fp8", "modelopt"))
    assert WAN.refusal("vllm-omni", "fp8", "vllm-omni") is None
    assert WAN.refusal("diffusers", "nvfp4") is None
    assert WAN.refusal("diffusers", "fp8", "modelopt") is None
