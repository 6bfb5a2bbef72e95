"""OmniGen2 and Ming-Image, which diffusers has no classes for, against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.table import find_family

QKV = ("to_q", "to_k", "to_v")
BLOCKS = ("noise_refiner.0", "ref_image_refiner.1", "context_refiner.0", "layers.31")
OMNIGEN_2 = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_out.0": ("attn.to_out.0",),
    "feed_forward.gate_up_proj": ("feed_forward.linear_1", "feed_forward.linear_3"),
    "feed_forward.down_proj": ("feed_forward.linear_2",),
}
NEVER = (
    "x_embedder",
    "ref_image_patch_embedder",
    "time_caption_embed.caption_embedder.1",
    "layers.31.norm1.linear",
    "norm_out.linear_1",
    "norm_out.linear_2",
)


def specs_of(*stems: str) -> Mapping[str, TensorSpec]:
    return {f"{stem}.weight": TensorSpec(f"{stem}.weight", torch.bfloat16, (64, 64)) for stem in stems}


def test_omnigen_2_builds_all_blocks_quantized_and_nothing_else() -> None:
    stems = [f"{block}.{leaf}" for block in BLOCKS for members in OMNIGEN_2.values() for leaf in members]
    groups = find_family("OmniGen2Transformer2DModel").layer_groups(specs_of(*stems, *NEVER), "vllm-omni")
    assert {group.runtime_name: group.members for group in groups} == {
        f"{block}.{name}": tuple(f"{block}.{leaf}" for leaf in members)
        for block in BLOCKS
        for name, members in OMNIGEN_2.items()
    }
    assert {group.runtime_name for group in groups if group.is_fused} == {
        f"{block}.{name}" for block in BLOCKS for name in ("attn.to_qkv", "feed_forward.gate_up_proj")
    }


@pytest.mark.parametrize(("method", "dialect"), [("nvfp4", "vllm-omni"), ("fp8", "modelopt"), ("mxfp8", "modelopt")])
def test_omnigen_2_as_modelopt_is_refused(method: str, dialect: str) -> None:
    family = find_family("OmniGen2Transformer2DModel")
    refusal = family.refusal("vllm-omni", method, dialect)
    assert refusal is not None
    assert "drops the scales of OmniGen2's feed-forward layers" in refusal.advice
    assert family.refusal("vllm-omni", "fp8", "vllm-omni") is None


def test_ming_image_has_the_layers_of_z_image_and_no_encoder(
    tiny_specs: Callable[[str], Mapping[str, TensorSpec]],
) -> None:
    specs = tiny_specs("ZImageTransformer2DModel")
    ming, z_image = find_family("DiffusionTransformer"), find_family("ZImageTransformer2DModel")
    assert ming.layer_groups(specs, "vllm-omni") == z_image.layer_groups(specs, "vllm-omni")
    assert z_image.shared_encoder_layers({"num_hidden_layers": 1})
    assert ming.shared_encoder_layers({"num_hidden_layers": 1}) == ()
    assert ming.refusal("diffusers") is not None
