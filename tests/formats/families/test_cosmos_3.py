"""Cosmos 3 against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.cosmos_3 import COSMOS_3

# Name in a layer of the checkpoint → module, and name below it, in the runtime.
LAYER = {
    **{
        f"self_attn.{leaf}": ("language_model.layers", f"self_attn.{leaf}")
        for leaf in ("to_q", "to_k", "to_v", "to_out")
    },
    "self_attn.add_q_proj": ("gen_layers", "cross_attention.to_q"),
    "self_attn.add_k_proj": ("gen_layers", "cross_attention.to_k"),
    "self_attn.add_v_proj": ("gen_layers", "cross_attention.to_v"),
    "self_attn.to_add_out": ("gen_layers", "cross_attention.to_out"),
    **{f"mlp.{leaf}_proj": ("language_model.layers", f"mlp.{leaf}_proj") for leaf in ("gate", "up", "down")},
    **{f"mlp_moe_gen.{leaf}_proj": ("gen_layers", f"mlp.{leaf}_proj") for leaf in ("gate", "up", "down")},
}


def test_both_pathways_of_a_layer_and_nothing_else(
    tiny_specs: Callable[[str], Mapping[str, TensorSpec]], tiny_model: Callable[[str, str], nn.Module]
) -> None:
    model = tiny_model("diffusers", "Cosmos3OmniTransformer")
    in_layers = {
        name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name.startswith("layers.")
    }
    for runtime in ("vllm-omni", "diffusers"):
        groups = COSMOS_3.layer_groups(tiny_specs("Cosmos3OmniTransformer"), runtime)
        assert {group.runtime_name: group.members for group in groups} == {
            f"{module}.{number}.{leaf}": (f"layers.{number}.{stem}",)
            for number in range(2)
            for stem, (module, leaf) in LAYER.items()
        }
        assert {stem for group in groups for stem in group.members} == in_layers
        assert not any(group.is_fused for group in groups)
