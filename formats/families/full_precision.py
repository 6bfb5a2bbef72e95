"""Families that vLLM-Omni builds in full precision: nothing of them may be stored quantized for it."""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts
from omni_convert.formats.families.layers import VLLM_OMNI

__all__ = ["HELIOS", "LONGCAT_IMAGE", "OVIS_IMAGE", "SANA_VIDEO", "SDXL", "SD_3"]

_REFUSED = ((VLLM_OMNI, "vLLM-Omni 0.30.0 builds every layer of this model in full precision"),)

SD_3 = Family(
    "Stable Diffusion 3",
    ("SD3Transformer2DModel",),
    refused_runtimes=_REFUSED,
    gguf=GgufFacts("sd3", diffusers_prefixes=("transformer_blocks.",)),
)
SDXL = Family("SDXL", ("UNet2DConditionModel",), refused_runtimes=_REFUSED)
LONGCAT_IMAGE = Family("LongCat-Image", ("LongCatImageTransformer2DModel",), refused_runtimes=_REFUSED)
OVIS_IMAGE = Family("Ovis-Image", ("OvisImageTransformer2DModel",), refused_runtimes=_REFUSED)
SANA_VIDEO = Family("SANA-Video", ("SanaVideoTransformer3DModel",), refused_runtimes=_REFUSED)
HELIOS = Family(
    "Helios",
    ("HeliosTransformer3DModel",),
    refused_runtimes=(
        (
            VLLM_OMNI,
            "vLLM-Omni 0.30.0 builds this model's linears without names, so that no layer could be left in BF16",
        ),
    ),
)
