"""Stable Diffusion XL. Its names also hold for Stable Diffusion 1.5 and 2, of the same class and with one level more.

Source of the names: diffusers' `convert_ldm_unet_checkpoint`.
"""

from __future__ import annotations

from typing import Any

from omni_convert.formats.families.derived_config import ConfigRule, Shapes
from omni_convert.formats.families.family import Family, GgufFacts, RuntimeRefusal
from omni_convert.formats.families.layers import VLLM_OMNI
from omni_convert.formats.families.original_names import OriginalName, renamed

__all__ = ["SDXL"]

_LEVELS, _RESNETS = 4, 2  # a block on the way up has one resnet more
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _resnet(original: str, name: str) -> tuple[OriginalName, ...]:
    return renamed(_RESNET, f"{original}.", f"{name}.")


def _way_down(level: int) -> tuple[OriginalName, ...]:
    first = 1 + level * (_RESNETS + 1)
    block = f"down_blocks.{level}"
    return (
        *(
            row
            for n in range(_RESNETS)
            for row in (
                *_resnet(f"input_blocks.{first + n}.0", f"{block}.resnets.{n}"),
                *renamed({f"input_blocks.{first + n}.1": f"{block}.attentions.{n}"}),
            )
        ),
        *renamed({f"input_blocks.{first + _RESNETS}.0.op": f"{block}.downsamplers.0.conv"}),
    )


def _way_up(level: int) -> tuple[OriginalName, ...]:
    first = level * (_RESNETS + 1)
    block = f"up_blocks.{level}"
    return (
        *(
            row
            for n in range(_RESNETS + 1)
            for row in (
                *_resnet(f"output_blocks.{first + n}.0", f"{block}.resnets.{n}"),
                *renamed({f"output_blocks.{first + n}.1": f"{block}.attentions.{n}"}),
            )
        ),
        # A block without attention has its upsampler in the attention's place.
        OriginalName(
            f"output_blocks.{first + _RESNETS}.2.conv",
            (f"{block}.upsamplers.0.conv",),
            beside=f"{block}.attentions.0.norm.weight",
        ),
        *renamed({f"output_blocks.{first + _RESNETS}.1.conv": f"{block}.upsamplers.0.conv"}),
    )


def _settings(shapes: Shapes) -> dict[str, Any]:
    levels = shapes.count("down_blocks.{}.resnets.0.conv1.weight")
    has_attention = [f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in range(levels)]
    attention = f"down_blocks.{has_attention.index(True)}.attentions.0"
    is_linear = len(shapes.find(f"{attention}.proj_in.weight") or ()) == 2
    channels = [shapes.rows(f"down_blocks.{level}.resnets.0.conv1.weight") for level in range(levels)]
    depths = [shapes.count(f"down_blocks.{n}.attentions.0.transformer_blocks.{{}}.norm1.weight") for n in range(levels)]
    added = shapes.columns_if_any("add_embedding.linear_1.weight")
    return {
        "in_channels": shapes.columns("conv_in.weight"),
        "out_channels": shapes.rows("conv_out.weight"),
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)],
        "layers_per_block": shapes.count("down_blocks.0.resnets.{}.conv1.weight"),
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": shapes.columns(f"{attention}.transformer_blocks.0.attn2.to_k.weight"),
        "use_linear_projection": is_linear,
        "attention_head_dim": [size // 64 for size in channels] if is_linear else 8,
        "addition_embed_type": "text_time" if added is not None else None,
        "addition_time_embed_dim": 256 if added is not None else None,
        "projection_class_embeddings_input_dim": added,
    }


SDXL = Family(
    "SDXL",
    ("UNet2DConditionModel",),
    refusals=(
        RuntimeRefusal(
            VLLM_OMNI, "vLLM-Omni 0.30.0 and 0.32.0rc1 build every layer of it in full precision", is_final=True
        ),
    ),
    original_names=(
        *renamed(
            {
                "time_embed.0": "time_embedding.linear_1",
                "time_embed.2": "time_embedding.linear_2",
                "label_emb.0.0": "add_embedding.linear_1",
                "label_emb.0.2": "add_embedding.linear_2",
                "input_blocks.0.0": "conv_in",
                "out.0": "conv_norm_out",
                "out.2": "conv_out",
                "middle_block.1": "mid_block.attentions.0",
            }
        ),
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
        *(row for level in range(_LEVELS) for row in (*_way_down(level), *_way_up(level))),
    ),
    gguf=GgufFacts(
        "sdxl",
        other_architectures=(("add_embedding.linear_1.weight", "sd1"),),
        prefix="model.diffusion_model.",  # without which diffusers finds nothing
        has_converter=True,
    ),
    config=(
        ConfigRule(
            "UNet2DConditionModel",
            ("conv_in.weight", "mid_block.resnets.1.conv1.weight", "time_embedding.linear_1.weight"),
            _settings,
            {
                key: {"block_out_channels": ([320, 640, 1280], [320, 640, 1280, 1280])}
                for key in ("attention_head_dim", "addition_time_embed_dim")
            },
        ),
    ),
)
