"""Families of which nothing may be stored quantized for vLLM-Omni, 0.30.0 and 0.32.0rc1 alike."""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts, RuntimeRefusal
from omni_convert.formats.families.flux_1 import FLUX_1
from omni_convert.formats.families.layers import VLLM_OMNI
from omni_convert.formats.families.original_names import joined, renamed, same
from omni_convert.formats.families.wan import WAN

__all__ = [
    "CHROMA",
    "ERNIE_IMAGE",
    "HELIOS",
    "HUNYUAN_IMAGE_21",
    "LONGCAT_IMAGE",
    "OVIS_IMAGE",
    "SANA_VIDEO",
    "SD_3",
    "WAN_ANIMATE",
]

_IN_FULL_PRECISION = (
    RuntimeRefusal(VLLM_OMNI, "vLLM-Omni 0.30.0 builds every layer of this model in full precision", is_final=True),
)
# helios_transformer.py and ernie_image_transformer.py pass `quant_config` to their linears, and no `prefix`.
_WITHOUT_NAMES = (
    RuntimeRefusal(
        VLLM_OMNI,
        "vLLM-Omni 0.30.0 builds this model's linears without names, so that no layer could be left in BF16",
        is_final=True,
    ),
)

_WITHOUT_CLASS = (
    RuntimeRefusal(VLLM_OMNI, "neither vLLM-Omni 0.30.0 nor 0.32.0rc1 has a class for this model", is_final=True),
)

CHROMA = Family(
    "Chroma",
    ("ChromaTransformer2DModel",),
    refusals=_WITHOUT_CLASS,
    original_names=(
        *FLUX_1.original_names,  # of which Chroma lacks the modulation
        *same("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
        *renamed(
            {
                "layers.{}.in_layer": "layers.{}.linear_1",
                "layers.{}.out_layer": "layers.{}.linear_2",
                "norms.{}.scale": "norms.{}.weight",
            },
            "distilled_guidance_layer.",
            "distilled_guidance_layer.",
        ),
    ),
    trainer_names=FLUX_1.trainer_names,
)
HUNYUAN_IMAGE_21 = Family("HunyuanImage-2.1", ("HunyuanImageTransformer2DModel",), refusals=_WITHOUT_CLASS)
WAN_ANIMATE = Family(
    "Wan-Animate",
    ("WanAnimateTransformer3DModel",),
    refusals=_WITHOUT_CLASS,
    # Without the motion encoder, whose biases have another shape there.
    original_names=(
        *WAN.original_names,
        *same("pose_patch_embedding", "face_encoder.out_proj", "face_encoder.padding_tokens"),
        *renamed(
            {f"{part}.conv": part for part in ("conv1_local", "conv2", "conv3")}, "face_encoder.", "face_encoder."
        ),
        joined("face_adapter.fuser_blocks.{}.linear1_kv", "face_adapter.{}", "to_k", "to_v"),
        *renamed(
            {"linear1_q": "to_q", "linear2": "to_out", "q_norm": "norm_q", "k_norm": "norm_k"},
            "face_adapter.fuser_blocks.{}.",
            "face_adapter.{}.",
        ),
    ),
    gguf=GgufFacts("wan", kept_layers=("condition_embedder",), diffusers_prefixes=("condition_embedder.",)),
)
SD_3 = Family(
    "Stable Diffusion 3",
    ("SD3Transformer2DModel",),
    refusals=_IN_FULL_PRECISION,
    gguf=GgufFacts("sd3", diffusers_prefixes=("transformer_blocks.",), has_converter=True),
)
LONGCAT_IMAGE = Family("LongCat-Image", ("LongCatImageTransformer2DModel",), refusals=_IN_FULL_PRECISION)
OVIS_IMAGE = Family("Ovis-Image", ("OvisImageTransformer2DModel",), refusals=_IN_FULL_PRECISION)
SANA_VIDEO = Family("SANA-Video", ("SanaVideoTransformer3DModel",), refusals=_IN_FULL_PRECISION)
HELIOS = Family("Helios", ("HeliosTransformer3DModel",), refusals=_WITHOUT_NAMES)
ERNIE_IMAGE = Family("ERNIE-Image", ("ErnieImageTransformer2DModel",), refusals=_WITHOUT_NAMES)
