"""HiDream-O1-Image: a repository of transformers with the config of Qwen3-VL, whose language model denoises pixels.

Source: vLLM-Omni 0.30.0 and 0.32.0rc1 alike, `diffusion/models/hidream_o1_image/`. Every linear but those of the vision
tower, which is not loaded, gets the config block; prefixes are the names in the checkpoint. It is told from Qwen3-VL by
a tensor in `model.safetensors.index.json` (`diffusion/utils/hf_utils.py`).
"""

from __future__ import annotations

from omni_convert.formats.families.family import Family, repository_refusals
from omni_convert.formats.families.layers import kept, linears, merged
from omni_convert.formats.families.stage import Stage

__all__ = ["HIDREAM_O1"]

_BLOCK = "model.language_model.layers.{}"
_AT_THE_EDGE = "outside of the blocks: small, and every block depends on it"
_FINAL_LAYER = "model.final_layer2.linear"

HIDREAM_O1 = Family(
    name="HiDream-O1",
    model_classes=("HiDreamO1ImageTransformer",),
    layers=(
        merged(f"{_BLOCK}.self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj"), loads_merged=False),
        *linears(f"{_BLOCK}.self_attn", "o_proj"),
        merged(f"{_BLOCK}.mlp", "gate_up_proj", ("gate_proj", "up_proj"), loads_merged=False),
        *linears(f"{_BLOCK}.mlp", "down_proj"),
        *(
            kept(stem, _AT_THE_EDGE)
            for stem in (
                "model.t_embedder1.mlp.0",
                "model.t_embedder1.mlp.2",
                "model.x_embedder.proj1",
                "model.x_embedder.proj2",
                _FINAL_LAYER,
            )
        ),
    ),
    refusals=repository_refusals(("gguf",), "vLLM-Omni has no adapter of GGUF for HiDream-O1"),
    stage=Stage(is_diffusion=True, signature=("Qwen3VLForConditionalGeneration", f"{_FINAL_LAYER}.weight")),
)
