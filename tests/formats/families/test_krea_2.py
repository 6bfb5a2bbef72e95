"""Krea 2 against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.krea_2 import KREA_2

BLOCK: dict[str, tuple[str, ...]] = {
    **{f"attn.{leaf}": () for leaf in ("to_q", "to_k", "to_v", "to_gate", "to_out.0")},
    **{f"ff.{leaf}": () for leaf in ("gate", "up", "down")},
}
OUTSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "text_fusion": {"projector": ()},
    "time_embed": {"linear_1": (), "linear_2": ()},
    "txt_in": {"linear_1": (), "linear_2": ()},
    "final_layer": {"linear": ()},
}
TOP = ("img_in", "time_mod_proj")


def test_every_linear_is_built_quantized_and_those_outside_of_the_blocks_are_kept(
    tiny_specs: Callable[[str], Mapping[str, TensorSpec]], tiny_model: Callable[[str, str], nn.Module]
) -> None:
    model = tiny_model("diffusers", "Krea2Transformer2DModel")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    specs = tiny_specs("Krea2Transformer2DModel")
    groups = KREA_2.layer_groups(specs, "vllm-omni")
    blocks = {f"transformer_blocks.{number}.{layer}" for number in range(2) for layer in BLOCK}
    fusion = {f"text_fusion.{stack}.0.{layer}" for stack in ("layerwise_blocks", "refiner_blocks") for layer in BLOCK}
    outside = {f"{parent}.{leaf}" for parent, leaves in OUTSIDE.items() for leaf in leaves} | {*TOP}
    assert {group.runtime_name for group in groups} == blocks | fusion | outside == linears
    assert all(group.members == (group.runtime_name,) and not group.is_fused for group in groups)
    assert {group.runtime_name for group in groups if group.keep_reason} == fusion | outside
    assert {group.runtime_name for group in KREA_2.layer_groups(specs, "diffusers")} == blocks
