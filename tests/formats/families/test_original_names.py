"""The tables of original names against diffusers' own conversions of single files, which go the other way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.original_names import OriginalTensor, known_runs
from omni_convert.formats.families.table import find_family
from omni_convert.formats.views.original_names import shapes_of, trace_conversion

#: Models of the widths that diffusers' conversions expect, and of few blocks.
MODELS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "Flux2Transformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "ZImageTransformer2DModel": {"n_layers": 1, "n_refiner_layers": 1},
    "LTXVideoTransformer3DModel": {"num_layers": 1},
    "LTX2VideoTransformer3DModel": {"num_layers": 1},
    "ChromaTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "HunyuanVideoTransformer3DModel": {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    "WanTransformer3DModel": {"num_layers": 1, "image_dim": 32, "added_kv_proj_dim": 5120},
    "WanVACETransformer3DModel": {"num_layers": 2, "vace_layers": [0, 1]},
    "WanAnimateTransformer3DModel": {"num_layers": 5},
    "SD3Transformer2DModel": {
        "num_layers": 2,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
        "caption_projection_dim": 1152,
    },
    "Krea2Transformer2DModel": {"num_layers": 1},
    "Lumina2Transformer2DModel": {"num_layers": 1},
    "UNet2DConditionModel": {
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
}


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_reads_back_every_original_name_and_so_do_we(kind: str) -> None:
    config, family = MODELS[kind], find_family(kind)
    shapes = shapes_of(getattr(diffusers, kind), config)
    specs = {name: TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()}
    tensors = family.original_tensors(specs)
    assert tensors is not None

    def original(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {family.gguf.prefix + name: joined(numbers, tensor) for name, tensor in tensors.items()}

    back = trace_conversion(specs, {"_class_name": kind, **config}, original)
    assert back == {name: [Run(name, 0, shape[0] if shape else 1)] for name, shape in shapes.items()}
    check_own_reading(family, specs, tensors)


def joined(numbers: Mapping[str, Tensor], tensor: OriginalTensor) -> Tensor:
    """The row numbers of an original tensor; where it is a vector, or was one, those of its elements."""
    rows = torch.cat([numbers[run.source][run.start : run.start + run.count] for run in tensor.runs])
    return rows.reshape(tensor.shape) if rows.numel() == math.prod(tensor.shape) else rows


def check_own_reading(family: Family, specs: Mapping[str, TensorSpec], tensors: Mapping[str, OriginalTensor]) -> None:
    """Checks that the table leads back to every row of diffusers' tensors."""
    stored = {name: TensorSpec(name, torch.bfloat16, tensor.shape) for name, tensor in tensors.items()}
    runs = family.diffusers_runs(specs, stored)
    assert runs is not None
    counter = itertools.count()
    numbers = {name: torch.tensor([next(counter) for _ in range(spec.shape[0])]) for name, spec in specs.items()}
    rows = {
        name: torch.cat([numbers[run.source][run.start : run.start + run.count] for run in tensor.runs])
        for name, tensor in tensors.items()
    }
    for name, found in runs.items():
        if len(rows[found[0].source]) == tensors[found[0].source].shape[0]:
            back = [rows[run.source][run.start : run.start + run.count] for run in found]
            assert torch.cat(back).equal(numbers[name]), name
        else:  # it has another shape there
            assert found == [Run(found[0].source, 0, tensors[found[0].source].shape[0])]


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
