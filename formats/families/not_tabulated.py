"""Families whose layers in vLLM-Omni are not known here: the generic rule chooses them for our own loader."""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts, unknown_scope

__all__ = [
    "AURA_FLOW",
    "COSMOS",
    "FRAMEPACK",
    "HIDREAM_I1",
    "HUNYUAN_VIDEO",
    "LUMINA_2",
    "MINIMAX_H3",
    "SANA_WM",
]

_UNKNOWN = unknown_scope("this model")

HIDREAM_I1 = Family(
    "HiDream-I1",
    ("HiDreamImageTransformer2DModel",),
    refusals=_UNKNOWN,
    has_original_names=True,
    gguf=GgufFacts("hidream", kept_layers=("gate",), has_converter=True),
)
MINIMAX_H3 = Family("MiniMax-H3", ("MiniMaxH3Transformer3DModel",), refusals=_UNKNOWN)
SANA_WM = Family("SANA-WM", ("SanaWMTransformer3DModel",), refusals=_UNKNOWN)

AURA_FLOW = Family(
    "AuraFlow", ("AuraFlowTransformer2DModel",), refusals=_UNKNOWN, gguf=GgufFacts("aura", has_converter=True)
)
COSMOS = Family(
    "Cosmos", ("CosmosTransformer3DModel",), refusals=_UNKNOWN, gguf=GgufFacts("cosmos", has_converter=True)
)
_HYVID = GgufFacts("hyvid", diffusers_prefixes=("context_embedder.",), has_converter=True)
HUNYUAN_VIDEO = Family("HunyuanVideo", ("HunyuanVideoTransformer3DModel",), refusals=_UNKNOWN, gguf=_HYVID)
FRAMEPACK = Family("FramePack", ("HunyuanVideoFramepackTransformer3DModel",), refusals=_UNKNOWN, gguf=_HYVID)
LUMINA_2 = Family(
    "Lumina 2",
    ("Lumina2Transformer2DModel",),
    refusals=_UNKNOWN,
    gguf=GgufFacts(
        "lumina2",
        kept_layers=("noise_refiner", "context_refiner"),
        diffusers_prefixes=("time_caption_embed.",),
        has_converter=True,
    ),
)
