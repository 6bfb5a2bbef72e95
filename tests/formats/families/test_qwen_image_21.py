"""Qwen-Image-2.1 against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.families.qwen_image_21 import QWEN_IMAGE_21

LAYERS = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    **{leaf: (leaf,) for leaf in ("attn.to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out")},
}


def test_layers_have_the_prefix_of_the_runtime(tiny_specs: Callable[[str], Mapping[str, TensorSpec]]) -> None:
    specs = tiny_specs("QwenImage21Transformer2DModel")
    for runtime in ("vllm-omni", "diffusers"):
        groups = QWEN_IMAGE_21.layer_groups(specs, runtime)
        assert {group.runtime_name: group.members for group in groups} == {
            f"transformer.transformer_blocks.{number}.{layer}": tuple(
                f"transformer_blocks.{number}.{member}" for member in members
            )
            for number in range(2)
            for layer, members in LAYERS.items()
        }
        assert {group.runtime_name.rpartition(".")[2] for group in groups if group.is_fused} == {"to_qkv"}


def test_encoder_names_are_all_linears_of_the_model_with_its_head() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    config = Qwen3VLConfig(
        text_config={**sizes, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2},
        vision_config={
            **sizes,
            "depth": 4,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1, 2],
        },
    )
    with torch.device("meta"):
        encoder = Qwen3VLForConditionalGeneration(config)
    linears = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    names = QWEN_IMAGE_21.shared_encoder_layers(config.to_dict())
    assert set(names) == linears
    assert len(names) == len(linears)
