"""Qwen-Image, with its Edit and Layered variants, which have the same transformer."""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts, Recommendation
from omni_convert.formats.families.layers import DOUBLE_STREAM_ATTENTION, linears

__all__ = ["QWEN_IMAGE"]

QWEN_IMAGE = Family(
    name="Qwen-Image",
    model_classes=("QwenImageTransformer2DModel",),
    layers=(
        *DOUBLE_STREAM_ATTENTION,
        *linears("transformer_blocks.{}.img_mlp", "net.0.proj", "net.2"),
        *linears("transformer_blocks.{}.txt_mlp", "net.0.proj", "net.2"),
    ),
    recommendations=(
        Recommendation(
            "img_mlp",
            "vLLM-Omni's guides disagree: the FP8 one keeps the image-stream MLPs in BF16 where quality regresses, "
            "because their inputs change over the denoising steps; the INT8 one quantizes every layer",
            methods=("fp8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4"),
        ),
    ),
    has_original_names=True,
    markers=(("zero_cond_t", "__index_timestep_zero__"),),
    gguf=GgufFacts("qwen_image", has_vllm_adapter=True),
)
