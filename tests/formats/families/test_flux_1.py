"""FLUX.1 against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.flux_1 import FLUX_1

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
SINGLE = {"attn.to_qkv": QKV, "proj_mlp": (), "proj_out": ()}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    check_layers(
        "FluxTransformer2DModel",
        {f"single_transformer_blocks.{number}": SINGLE for number in range(2)},
        never=(
            "transformer_blocks.0.norm1.linear",
            "single_transformer_blocks.0.norm.linear",
            "x_embedder",
            "context_embedder",
            "time_text_embed.guidance_embedder.linear_1",
            "norm_out.linear",
            "proj_out",
        ),
    )


def test_double_blocks_are_only_in_the_scope_of_diffusers_and_of_auto_round(
    tiny_specs: Callable[[str], Mapping[str, TensorSpec]],
) -> None:
    specs = tiny_specs("FluxTransformer2DModel")
    packed = {group.runtime_name for group in FLUX_1.layer_groups(specs, "vllm-omni", {"w4a16"}, "auto-round")}
    omni = {group.runtime_name for group in FLUX_1.layer_groups(specs, "vllm-omni")}
    ours = {group.runtime_name for group in FLUX_1.layer_groups(specs, "diffusers")}
    double = {
        f"transformer_blocks.{number}.{layer}" for number in range(2) for layer in {**DOUBLE_STREAM, **FEED_FORWARDS}
    }
    assert not any(name.startswith("transformer_blocks") for name in omni)
    assert ours == omni | double == packed
