"""GLM-Image against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.glm_image import GLM_IMAGE

CheckLayers = Callable[..., None]

QKV = ("to_q", "to_k", "to_v")
BLOCK = {"attn1.to_qkv": QKV, "attn1.to_out.0": (), "ff.net.0.proj": (), "ff.net.2": (), "norm1.linear": ()}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    check_layers(
        "GlmImageTransformer2DModel",
        {f"transformer_blocks.{number}": BLOCK for number in range(2)}
        | {f"{name}_projector": {"net.0.proj": (), "net.2": ()} for name in ("glyph", "prior")},
        never=("image_projector.proj", "prior_token_embedding", "norm_out.linear", "proj_out"),
    )


def test_what_is_kept_is_listed_so_that_it_can_be_ignored(
    tiny_specs: Callable[[str], Mapping[str, TensorSpec]],
) -> None:
    specs = tiny_specs("GlmImageTransformer2DModel")
    groups = GLM_IMAGE.layer_groups(specs, "vllm-omni")
    kept = {group.runtime_name for group in groups if group.keep_reason}
    assert kept == {
        *(f"transformer_blocks.{number}.norm1.linear" for number in range(2)),
        *(f"{name}_projector.net.{layer}" for name in ("glyph", "prior") for layer in ("0.proj", "2")),
    }
    ours = {group.runtime_name for group in GLM_IMAGE.layer_groups(specs, "diffusers")}
    assert ours == {group.runtime_name for group in groups} - kept
