"""Qwen3-Omni, Qwen2.5-Omni and Qwen3-TTS: repositories of transformers, of which one language model is quantized.

Their stages are vLLM's own autoregressive models. These have vLLM's methods, not those of vLLM-Omni's diffusion models.
"""

from __future__ import annotations

from omni_convert.formats.families.family import Family, repository_refusal, repository_refusals
from omni_convert.formats.families.layers import LayerPattern, experts, kept, linears, merged
from omni_convert.formats.families.stage import Fp8Refusal, Stage

__all__ = ["QWEN_2_5_OMNI", "QWEN_3_OMNI", "QWEN_3_TTS"]

_HEAD = "head: turns the last hidden state into tokens"
_ROUTER = "router: its choice of experts decides what is computed"
_REFUSALS = repository_refusals(
    ("int8", "mxfp8", "mxfp4", "mxfp4_dualscale", "svdquant_nvfp4", "gguf"),
    "vLLM-Omni's autoregressive stages have no method that loads this one; fp8, nvfp4 and w4a16 are there",
    ("compressed-tensors", "msmodelslim"),
)


def _attention(block: str) -> tuple[LayerPattern, ...]:
    return (
        merged(f"{block}.self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj"), loads_merged=False),
        *linears(f"{block}.self_attn", "o_proj"),
    )


def _dense(block: str) -> tuple[LayerPattern, ...]:
    return (
        merged(f"{block}.mlp", "gate_up_proj", ("gate_proj", "up_proj"), loads_merged=False),
        *linears(f"{block}.mlp", "down_proj"),
    )


_THINKER = "thinker.model.layers.{}"
_TALKER = "talker.model.layers.{}"

QWEN_3_OMNI = Family(
    name="Qwen3-Omni",
    model_classes=("Qwen3OmniMoeForConditionalGeneration",),
    layers=(
        *_attention(_THINKER),
        *experts(f"{_THINKER}.mlp"),
        *_dense(_THINKER),
        kept(f"{_THINKER}.mlp.gate", _ROUTER),
        kept("thinker.lm_head", _HEAD),
    ),
    refusals=_REFUSALS,
    stage=Stage(
        prefix="thinker.",
        runtime_prefix="thinker.language_model.",
        config_path=("thinker_config", "text_config"),
        ignored=("*mlp.gate", "lm_head"),
        other_stages=("talker*",),
        fp8_refusals=(
            Fp8Refusal(
                ("row",),
                "the experts of vLLM-Omni's thinker load FP8 with static activations alone",
                "add --calib PROMPTS or --calibration STATISTICS",
            ),
        ),
        transformers_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
)
QWEN_2_5_OMNI = Family(
    name="Qwen2.5-Omni",
    model_classes=("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
    layers=(*_attention(_THINKER), *_dense(_THINKER), kept("thinker.lm_head", _HEAD)),
    refusals=_REFUSALS,
    # ModelOpt's blocks are withheld from the vision tower there; `thinker.visual` is for all others.
    stage=Stage(
        prefix="thinker.",
        runtime_prefix="thinker.language_model.",
        config_path=("thinker_config", "text_config"),
        ignored=("lm_head", "*visual*"),
        other_stages=("talker*",),
        transformers_class="Qwen2_5OmniThinkerForConditionalGeneration",
    ),
)
QWEN_3_TTS = Family(
    name="Qwen3-TTS",
    model_classes=("Qwen3TTSForConditionalGeneration",),
    layers=(*_attention(_TALKER), *_dense(_TALKER), kept("talker.codec_head", _HEAD, runtime_name="lm_head")),
    refusals=(
        *_REFUSALS,
        repository_refusal(
            "vLLM-Omni does not map `block_name_to_quantize` to the names of this model's layers",
            dialects=("auto-round",),
        ),
    ),
    stage=Stage(prefix="talker.", ignored=("lm_head",)),
)
