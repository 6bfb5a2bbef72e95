"""The tables of original names against diffusers' own conversions of single files, which go the other way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from omni_convert.convert.source.original_names import shapes_of, trace_conversion
from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.families.original_names import known_runs
from omni_convert.formats.families.table import find_family

#: Models of the widths that diffusers' conversions expect, and of few blocks; and a part of the names of tensors that
#: the tables leave out.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "FluxTransformer2DModel": ({"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}, ""),
    "Flux2Transformer2DModel": ({"num_layers": 1, "num_single_layers": 1}, ""),
    "ZImageTransformer2DModel": ({"n_layers": 1, "n_refiner_layers": 1}, ""),
    "LTXVideoTransformer3DModel": ({"num_layers": 1}, ""),
    "LTX2VideoTransformer3DModel": ({"num_layers": 1}, ""),
    "ChromaTransformer2DModel": ({"num_layers": 1, "num_single_layers": 1}, ""),
    "HunyuanVideoTransformer3DModel": ({"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}, ""),
    "WanTransformer3DModel": ({"num_layers": 1, "image_dim": 32, "added_kv_proj_dim": 5120}, ""),
    "WanVACETransformer3DModel": ({"num_layers": 2, "vace_layers": [0, 1]}, ""),
    "WanAnimateTransformer3DModel": ({"num_layers": 5}, "motion_encoder."),
    "SD3Transformer2DModel": (
        {"num_layers": 2, "dual_attention_layers": [0], "qk_norm": "rms_norm", "caption_projection_dim": 1152},
        "context.linear",
    ),
    "Krea2Transformer2DModel": ({"num_layers": 1}, "_blocks.0.scale_shift_table"),
    "Lumina2Transformer2DModel": ({"num_layers": 1}, ""),
    "UNet2DConditionModel": (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "class_embed_type": None,
            "layers_per_block": 2,
            "projection_class_embeddings_input_dim": 2816,
            "transformer_layers_per_block": [1, 2, 3],
            "use_linear_projection": True,
        },
        "",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_reads_back_every_original_name(kind: str) -> None:
    config, left_out = MODELS[kind]
    shapes = shapes_of(getattr(diffusers, kind), config)
    specs = {name: TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()}
    known = [name for name in specs if not left_out or left_out not in name]
    runs = known_runs(find_family(kind).original_names, specs)
    # ComfyUI's prefix, without which diffusers does not find the parts of a UNet.
    prefix = "model.diffusion_model." if kind == "UNet2DConditionModel" else ""

    def original(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {prefix + name: torch.cat([rows(numbers, run) for run in found]) for name, found in runs.items()}
        if kind == "SD3Transformer2DModel":  # whose conversion insists on what the table leaves out
            for name in specs.keys() - set(known):
                block = name.replace("transformer_blocks", "joint_blocks")
                named[block.replace("norm1_context.linear", "context_block.adaLN_modulation.1")] = numbers[name]
        return named

    back = trace_conversion(specs, {"_class_name": kind, **config}, original)
    assert back is not None
    assert {name: back.get(name) for name in known} == {name: [Run(name, 0, shapes[name][0])] for name in known}


def rows(numbers: Mapping[str, Tensor], run: Run) -> Tensor:
    return numbers[run.source][run.start : run.start + run.count]


def test_hunyuan_video_15_has_the_names_of_its_conversion_script() -> None:
    """diffusers converts it with a script outside of the package: a few names of each kind from there."""
    kind = "HunyuanVideo15Transformer3DModel"
    shapes = shapes_of(getattr(diffusers, kind), {"num_layers": 1, "num_refiner_layers": 1})
    specs = {name: TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()}
    runs = known_runs(find_family(kind).original_names, specs)
    refiner = "context_embedder.token_refiner.refiner_blocks.0"
    for original, names in {
        "time_in.mlp.2.weight": ["time_embed.timestep_embedder.linear_2.weight"],
        "txt_in.c_embedder.linear_1.bias": ["context_embedder.time_text_embed.text_embedder.linear_1.bias"],
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight": [
            f"{refiner}.attn.to_{part}.weight" for part in "qkv"
        ],
        "byt5_in.fc3.weight": ["context_embedder_2.linear_3.weight"],
        "vision_in.proj.3.weight": ["image_embedder.linear_2.weight"],
        "cond_type_embedding.weight": ["cond_type_embed.weight"],
        "double_blocks.0.img_attn_k.bias": ["transformer_blocks.0.attn.to_k.bias"],
        "double_blocks.0.txt_attn_v.weight": ["transformer_blocks.0.attn.add_v_proj.weight"],
        "double_blocks.0.txt_mlp.fc2.weight": ["transformer_blocks.0.ff_context.net.2.weight"],
    }.items():
        assert runs[original] == [Run(name, 0, shapes[name][0]) for name in names]
    half = shapes["norm_out.linear.weight"][0] // 2
    turned = [Run("norm_out.linear.weight", half, half), Run("norm_out.linear.weight", 0, half)]
    assert runs["final_layer.adaLN_modulation.1.weight"] == turned
