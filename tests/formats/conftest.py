"""Tiny models of real classes, as the tensors that their checkpoints would hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.statistics.layer_statistics import InputRecorder, LayerStatistics, observe

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 6, 6)}
FLUX = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32, **HEADS, **ROPE}
WAN = {"text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, **HEADS}

TINY_DIFFUSERS: dict[str, dict[str, Any]] = {
    "ZImageTransformer2DModel": {
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [8, 12, 12],
        "axes_lens": [16, 16, 16],
        "siglip_feat_dim": 32,
    },
    "QwenImageTransformer2DModel": {"num_layers": 2, "joint_attention_dim": 32, **HEADS, **ROPE},
    "QwenImage21Transformer2DModel": {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "FluxTransformer2DModel": {**FLUX, "pooled_projection_dim": 32, "guidance_embeds": True},
    "Flux2Transformer2DModel": {**FLUX, "axes_dims_rope": (4, 4, 4, 4)},
    "HunyuanVideo15Transformer3DModel": {
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "text_embed_2_dim": 32,
        "image_embed_dim": 32,
        "rope_axes_dim": (4, 6, 6),
        **HEADS,
    },
    "WanTransformer3DModel": {**WAN, "image_dim": 32, "added_kv_proj_dim": 32},
    "WanVACETransformer3DModel": {**WAN, "vace_layers": [0, 1]},
    "GlmImageTransformer2DModel": {
        "num_layers": 2,
        "text_embed_dim": 32,
        "time_embed_dim": 32,
        "condition_dim": 16,
        "prior_vq_quantizer_codebook_size": 32,
        **HEADS,
    },
    "LTX2VideoTransformer3DModel": {
        "num_layers": 2,
        "cross_attention_dim": 32,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "caption_channels": 32,
        "gated_attn": True,
        "audio_gated_attn": True,
        **HEADS,
    },
    "SD3Transformer2DModel": {
        "num_layers": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
        "sample_size": 8,
        "dual_attention_layers": (0,),
        **HEADS,
    },
    "LongCatImageTransformer2DModel": {**FLUX, "pooled_projection_dim": 32},
    "OvisImageTransformer2DModel": FLUX,
    "HeliosTransformer3DModel": {**WAN, "rope_dim": (4, 6, 6)},
    "Krea2Transformer2DModel": {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 32,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 64,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    },
    "Cosmos3OmniTransformer": {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
    "HunyuanImageTransformer2DModel": {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "rope_axes_dim": (8, 8),
        **HEADS,
    },
    "PixArtTransformer2DModel": {
        "num_layers": 2,
        "cross_attention_dim": 32,
        "caption_channels": 32,
        "sample_size": 8,
        **HEADS,
    },
}

TINY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Qwen3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 40,
    },
    "T5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
}


@lru_cache
def _tiny_model(library: str, class_name: str) -> nn.Module:
    module = importlib.import_module(library)
    model_class = getattr(module, class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return model_class(**TINY_DIFFUSERS[class_name])
        family = next(name for name in TINY_TRANSFORMERS if class_name.startswith(name))
        return model_class(getattr(module, f"{family}Config")(**TINY_TRANSFORMERS[family]))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str, str], nn.Module]:
    """A tiny model of a class of `diffusers` or `transformers`, on the meta device."""
    return _tiny_model


@pytest.fixture(scope="session")
def tiny_specs() -> Callable[[str], Mapping[str, TensorSpec]]:
    """The tensors of a tiny model of a diffusers class."""

    def specs(class_name: str) -> Mapping[str, TensorSpec]:
        state = _tiny_model("diffusers", class_name).state_dict()
        return {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}

    return specs


@pytest.fixture(scope="session")
def record_inputs() -> Callable[[Tensor], LayerStatistics]:
    """Records the rows of a layer's input, bfloat16 [rows, in], as those of some prompts."""

    def record(rows: Tensor, prompts: int = 8) -> LayerStatistics:
        recorder = InputRecorder()
        for prompt, some in enumerate(rows.chunk(prompts)):
            recorder.record(observe(some), step=0, prompt=prompt)
        statistics = recorder.statistics()
        assert statistics is not None
        return statistics

    return record
