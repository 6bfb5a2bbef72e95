"""Families of which nothing may be stored quantized for vLLM-Omni, 0.30.0 and 0.32.0rc1 alike."""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts, RuntimeRefusal
from omni_convert.formats.families.layers import VLLM_OMNI

__all__ = [
    "CHROMA",
    "ERNIE_IMAGE",
    "HELIOS",
    "HUNYUAN_IMAGE_21",
    "LONGCAT_IMAGE",
    "OVIS_IMAGE",
    "SANA_VIDEO",
    "SDXL",
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

CHROMA = Family("Chroma", ("ChromaTransformer2DModel",), refusals=_WITHOUT_CLASS)
HUNYUAN_IMAGE_21 = Family("HunyuanImage-2.1", ("HunyuanImageTransformer2DModel",), refusals=_WITHOUT_CLASS)
WAN_ANIMATE = Family(
    "Wan-Animate",
    ("WanAnimateTransformer3DModel",),
    refusals=_WITHOUT_CLASS,
    gguf=GgufFacts("wan", kept_layers=("condition_embedder",), diffusers_prefixes=("condition_embedder.",)),
)
SD_3 = Family(
    "Stable Diffusion 3",
    ("SD3Transformer2DModel",),
    refusals=_IN_FULL_PRECISION,
    gguf=GgufFacts("sd3", diffusers_prefixes=("transformer_blocks.",), has_converter=True),
)
SDXL = Family("SDXL", ("UNet2DConditionModel",), refusals=_IN_FULL_PRECISION)
LONGCAT_IMAGE = Family("LongCat-Image", ("LongCatImageTransformer2DModel",), refusals=_IN_FULL_PRECISION)
OVIS_IMAGE = Family("Ovis-Image", ("OvisImageTransformer2DModel",), refusals=_IN_FULL_PRECISION)
SANA_VIDEO = Family("SANA-Video", ("SanaVideoTransformer3DModel",), refusals=_IN_FULL_PRECISION)
HELIOS = Family("Helios", ("HeliosTransformer3DModel",), refusals=_WITHOUT_NAMES)
ERNIE_IMAGE = Family("ERNIE-Image", ("ErnieImageTransformer2DModel",), refusals=_WITHOUT_NAMES)
