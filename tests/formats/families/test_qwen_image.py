"""Qwen-Image against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from omni_convert.formats.families.qwen_image import QWEN_IMAGE

CheckLayers = Callable[..., None]

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE_STREAM = {"attn.to_qkv": QKV, "attn.add_kv_proj": ADDED, "attn.to_out.0": (), "attn.to_add_out": ()}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    block = DOUBLE_STREAM | {f"{mlp}.{leaf}": () for mlp in ("img_mlp", "txt_mlp") for leaf in ("net.0.proj", "net.2")}
    check_layers(
        "QwenImageTransformer2DModel",
        {f"transformer_blocks.{number}": block for number in range(2)},
        never=(
            "transformer_blocks.0.img_mod.1",
            "transformer_blocks.0.txt_mod.1",
            "img_in",
            "txt_in",
            "time_text_embed.timestep_embedder.linear_1",
            "norm_out.linear",
            "proj_out",
        ),
    )


def test_img_mlp_is_recommended_only_where_a_guide_does() -> None:
    assert [each.pattern for each in QWEN_IMAGE.recommended_ignored("fp8")] == ["img_mlp"]
    assert QWEN_IMAGE.recommended_ignored("int8") == ()


def test_the_encoder_shares_nothing(tiny_model: Callable[[str, str], nn.Module]) -> None:
    encoder = tiny_model("transformers", "Qwen3ForCausalLM").config.to_dict()
    assert QWEN_IMAGE.shared_encoder_layers(encoder) == ()
