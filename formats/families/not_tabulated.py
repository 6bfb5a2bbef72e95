"""Families whose layers in vLLM-Omni are not known here: the generic rule chooses them for our own loader."""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts
from omni_convert.formats.families.layers import VLLM_OMNI

__all__ = [
    "AURA_FLOW",
    "COSMOS",
    "ERNIE_IMAGE",
    "FRAMEPACK",
    "HIDREAM_I1",
    "HUNYUAN_VIDEO",
    "KREA_2",
    "LUMINA_2",
    "MINIMAX_H3",
    "SANA_WM",
]

_REFUSED = ((VLLM_OMNI, "which layers vLLM-Omni builds quantized for this model is not known here"),)

ERNIE_IMAGE = Family("ERNIE-Image", ("ErnieImageTransformer2DModel",), refused_runtimes=_REFUSED)
HIDREAM_I1 = Family(
    "HiDream-I1",
    ("HiDreamImageTransformer2DModel",),
    refused_runtimes=_REFUSED,
    has_original_names=True,
    gguf=GgufFacts("hidream", kept_layers=("gate",)),
)
KREA_2 = Family("Krea 2", ("Krea2Transformer2DModel",), refused_runtimes=_REFUSED)
MINIMAX_H3 = Family("MiniMax-H3", ("MiniMaxH3Transformer3DModel",), refused_runtimes=_REFUSED)
SANA_WM = Family("SANA-WM", ("SanaWMTransformer3DModel",), refused_runtimes=_REFUSED)

AURA_FLOW = Family("AuraFlow", ("AuraFlowTransformer2DModel",), gguf=GgufFacts("aura"))
COSMOS = Family("Cosmos", ("CosmosTransformer3DModel",), gguf=GgufFacts("cosmos"))
_HUNYUAN_VIDEO_GGUF = GgufFacts("hyvid", diffusers_prefixes=("context_embedder.",))
HUNYUAN_VIDEO = Family("HunyuanVideo", ("HunyuanVideoTransformer3DModel",), gguf=_HUNYUAN_VIDEO_GGUF)
FRAMEPACK = Family("FramePack", ("HunyuanVideoFramepackTransformer3DModel",), gguf=_HUNYUAN_VIDEO_GGUF)
LUMINA_2 = Family(
    "Lumina 2",
    ("Lumina2Transformer2DModel",),
    gguf=GgufFacts(
        "lumina2", kept_layers=("noise_refiner", "context_refiner"), diffusers_prefixes=("time_caption_embed.",)
    ),
)
