"""Tiny models of every family that the converter knows: diffusers' own classes with fixed random weights.

A few families have a class in no package. Their tensors have the names that vLLM-Omni's loader reads.

Names and structure are those of the real models; widths are 128 to 512, so that every format can hold most layers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file

__all__ = ["MODELS", "OTHERS", "PIPELINES", "save_model", "save_pipeline"]

JOINT = {"num_layers": 1, "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 128}
DUAL = {**JOINT, "num_single_layers": 1, "in_channels": 16}
WAN = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "text_dim": 64}
ROPE = (16, 24, 24)

#: Name of the family → class of the transformer and the arguments that make it small.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "z_image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 192,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 64,
            "axes_dims": [16, 24, 24],
        },
    ),
    "qwen_image": ("QwenImageTransformer2DModel", {**JOINT, "num_layers": 2, "axes_dims_rope": ROPE}),
    "qwen_image_21": (
        "QwenImage21Transformer2DModel",
        {
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "context_in_dim": 128,
            "axes_dims_rope": ROPE,
        },
    ),
    "flux_1": (
        "FluxTransformer2DModel",
        {**DUAL, "pooled_projection_dim": 64, "axes_dims_rope": ROPE, "guidance_embeds": True},
    ),
    "flux_2": (
        "Flux2Transformer2DModel",
        {**DUAL, "timestep_guidance_channels": 64, "axes_dims_rope": (16, 16, 16, 16)},
    ),
    "hunyuan_video_15": (
        "HunyuanVideo15Transformer3DModel",
        {
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "text_embed_dim": 64,
            "text_embed_2_dim": 64,
            "image_embed_dim": 64,
            "rope_axes_dim": ROPE,
        },
    ),
    "wan": ("WanTransformer3DModel", {**WAN, "num_layers": 2}),
    "wan_i2v": ("WanTransformer3DModel", {**WAN, "image_dim": 64, "added_kv_proj_dim": 128}),
    "wan_5b": ("WanTransformer3DModel", {**WAN, "in_channels": 48}),
    "wan_vace": ("WanVACETransformer3DModel", {**WAN, "vace_layers": [0]}),
    "glm_image": (
        "GlmImageTransformer2DModel",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "text_embed_dim": 64,
            "time_embed_dim": 64,
            "condition_dim": 64,
            "prior_vq_quantizer_codebook_size": 64,
        },
    ),
    "ltx_2": (
        "LTX2VideoTransformer3DModel",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 64,
            "audio_cross_attention_dim": 128,
            "caption_channels": 64,
        },
    ),
    "ltx_video": (
        "LTXVideoTransformer3DModel",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "caption_channels": 64,
        },
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "text_embed_dim": 64,
            "pooled_projection_dim": 64,
            "rope_axes_dim": ROPE,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **JOINT,
            "sample_size": 8,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 8,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (64, 64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (1, 1, 2),
            "cross_attention_dim": 64,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 112,
        },
    ),
    "sd_15": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (64, 64, 64, 128),
            "attention_head_dim": 2,
            "cross_attention_dim": 64,
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "axes_dims_rope": (16, 24, 24),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 64,
            "approximator_layers": 1,
        },
    ),
    "lumina_2": (
        "Lumina2Transformer2DModel",
        {
            "in_channels": 16,
            "hidden_size": 192,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "cap_feat_dim": 64,
            "axes_dim_rope": (16, 16, 16),
        },
    ),
    "wan_animate": (
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "num_layers": 5,
            "image_dim": 64,
            "added_kv_proj_dim": 128,
            "motion_encoder_channel_sizes": {str(2**size): 16 for size in range(2, 10)},
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 32,
            "face_encoder_num_heads": 2,
        },
    ),
    "longcat_image": ("LongCatImageTransformer2DModel", {**DUAL, "pooled_projection_dim": 64, "axes_dims_rope": ROPE}),
    "ovis_image": ("OvisImageTransformer2DModel", {**DUAL, "out_channels": 16, "axes_dims_rope": ROPE}),
    "sana_video": (
        "SanaVideoTransformer3DModel",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 64,
            "cross_attention_dim": 128,
            "caption_channels": 64,
        },
    ),
    "helios": ("HeliosTransformer3DModel", {**WAN, "rope_dim": ROPE}),
    "ernie_image": (
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 256,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": 64,
            "rope_axes_dim": ROPE,
        },
    ),
    "hidream_i1": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "caption_channels": [64, 64],
            "text_emb_dim": 64,
            "num_routed_experts": 2,
            "llama_layers": [0, 1],
        },
    ),
    "krea_2": (
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 256,
            "timestep_embed_dim": 64,
            "text_hidden_dim": 128,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 128,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": ROPE,
        },
    ),
    "cosmos_3": (
        "Cosmos3OmniTransformer",
        {
            "head_dim": 64,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
            "vocab_size": 128,
        },
    ),
    "minimax_h3": (
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "hidden_size": 128,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 256,
            "text_dim": 64,
            "freq_dim": 64,
            "time_embed_hidden_dim": 128,
            "time_embed_dim": 64,
        },
    ),
    "sana_wm": (
        "SanaWMTransformer3DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "linear_head_dim": 64,
            "caption_channels": 64,
        },
    ),
}


#: What makes `OmniGen2Transformer2DModel`, which vLLM-Omni has and diffusers has not, small.
OMNIGEN_2: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 128,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 64,
    "axes_dim_rope": [8, 12, 12],
    "axes_lens": [64, 64, 64],
    "text_feat_dim": 64,
    "timestep_scale": 1000.0,
}


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT))


def _mistral3() -> Any:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    text = {"model_type": "mistral", **TEXT}
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config={"model_type": "pixtral", **vision})
    )


TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

#: Pipelines of several components: class, transformers by folder, and what makes the text encoder.
PIPELINES: dict[str, tuple[str, dict[str, str], Callable[[], Any] | None]] = {
    "z_image_pipeline": ("ZImagePipeline", {"transformer": "z_image"}, _qwen3),
    "flux_2_pipeline": ("Flux2Pipeline", {"transformer": "flux_2"}, _mistral3),
    "flux_2_klein_pipeline": ("Flux2KleinPipeline", {"transformer": "flux_2"}, _qwen3),
    "wan_pipeline": ("WanPipeline", {"transformer": "wan", "transformer_2": "wan"}, None),
}


def save_model(name: str, folder: Path, seed: int = 0) -> None:
    """Saves one of `MODELS` or `OTHERS` in bfloat16, with values that have the outliers of trained weights."""
    if name in OTHERS:
        OTHERS[name](folder, seed)
        return
    class_name, arguments = MODELS[name]
    _save(lambda: getattr(diffusers, class_name)(**arguments), folder, seed)


def save_pipeline(name: str, folder: Path) -> None:
    """Saves the weights and configs of one of `PIPELINES`; enough to convert it, not to run it."""
    class_name, models, text_encoder = PIPELINES[name]
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.38.0"}
    for seed, (component, model) in enumerate(models.items()):
        save_model(model, folder / component, seed)
        index[component] = ["diffusers", MODELS[model][0]]
    if text_encoder is not None:
        encoder = _save(text_encoder, folder / "text_encoder", seed=9)
        index["text_encoder"] = ["transformers", type(encoder).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(build: Callable[[], Any], folder: Path, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers about its own code
        torch.manual_seed(seed)
        model: Any = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(_trained_like(*parameter.shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    return model


def _save_omnigen_2(folder: Path, seed: int, width: int = OMNIGEN_2["hidden_size"]) -> None:
    """The names of OmniGen2's own code, which vLLM-Omni's loader reads."""
    linears: dict[str, tuple[int, int]] = {
        "x_embedder": (width, 16),
        "ref_image_patch_embedder": (width, 16),
        "time_caption_embed.timestep_embedder.linear_1": (width, 256),
        "time_caption_embed.timestep_embedder.linear_2": (width, width),
        "time_caption_embed.caption_embedder.1": (width, 64),
        "norm_out.linear_1": (width, width),
        "norm_out.linear_2": (16, width),
    }
    biases = {stem: shape[:1] for stem, shape in linears.items()}
    norms = {"time_caption_embed.caption_embedder.0": 64}
    for block in ("noise_refiner.0", "ref_image_refiner.0", "context_refiner.0", "layers.0", "layers.1"):
        heads = {"to_q": width, "to_k": width // 2, "to_v": width // 2, "to_out.0": width}
        linears |= {f"{block}.attn.{leaf}": (rows, width) for leaf, rows in heads.items()}
        linears |= {f"{block}.feed_forward.linear_{number}": (512, width) for number in (1, 3)}
        linears[f"{block}.feed_forward.linear_2"] = (width, 512)
        norms |= {f"{block}.attn.{leaf}": width // 4 for leaf in ("norm_q", "norm_k")}
        norms |= {f"{block}.{leaf}": width for leaf in ("ffn_norm1", "norm2", "ffn_norm2")}
        if block == "context_refiner.0":
            norms[f"{block}.norm1"] = width
        else:
            norms[f"{block}.norm1.norm"] = width
            linears[f"{block}.norm1.linear"], biases[f"{block}.norm1.linear"] = (4 * width, width), (4 * width,)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tensors = {f"{stem}.weight": _trained_like(*shape) for stem, shape in linears.items()}
        tensors["image_index_embedding"] = torch.randn(5, width)
    tensors |= {f"{stem}.bias": torch.zeros(shape) for stem, shape in biases.items()}
    tensors |= {f"{stem}.weight": torch.ones(width) for stem, width in norms.items()}
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
        folder / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    axes = [width // 4 - 24, 12, 12]
    config = {**OMNIGEN_2, "hidden_size": width, "axes_dim_rope": axes, "_class_name": "OmniGen2Transformer2DModel"}
    (folder / "config.json").write_text(json.dumps(config))


def _save_ming_image(folder: Path, seed: int) -> None:
    """Z-Image's transformer under the name of Ming-Image's own class."""
    save_model("z_image", folder, seed)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_class_name": "DiffusionTransformer", "alignment_padding_mode": "learned", "multi_frame_output": True}
    (folder / "config.json").write_text(json.dumps(config))


def _trained_like(rows: int, columns: int) -> torch.Tensor:
    """Heavy tails, and rows and columns of different sizes: [rows, columns]."""
    values = torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02
    return values * (torch.randn(columns) * 0.7).exp() * (torch.randn(rows, 1) * 0.4).exp()


#: Models that diffusers has no class for: name of the family → what saves one, with a seed.
OTHERS: dict[str, Callable[[Path, int], None]] = {
    "omnigen_2": _save_omnigen_2,
    "omnigen_2_short": lambda folder, seed: _save_omnigen_2(folder, seed, 120),  # as 2520, no multiple of 32
    "ming_image": _save_ming_image,
}
