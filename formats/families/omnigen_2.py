"""OmniGen2.

Source: vLLM-Omni 0.30.0 and 0.32.0rc1 alike, `diffusion/models/omnigen2/`. Everything in the blocks but the modulation
gets the config block, and prefixes are those of the transformer. Its width of 2520 is no multiple of 32: with MX, the
last block of a row is short, as the runtime expects; with W4A16, the second layer of each feed-forward is all that can
be quantized. ModelOpt's adapter knows no names of
merged feed-forwards: it drops their scales.
"""

from __future__ import annotations

from omni_convert.formats.families.family import NOT_IN_DIFFUSERS, Family, RuntimeRefusal
from omni_convert.formats.families.layers import QKV, VLLM_OMNI, LayerPattern, linears, merged, renamed

__all__ = ["OMNIGEN_2"]

_NOT_AS_MODELOPT = "vLLM-Omni's adapter for ModelOpt drops the scales of OmniGen2's feed-forward layers"


def _block(block: str) -> tuple[LayerPattern, ...]:
    return (
        merged(f"{block}.attn", "to_qkv", QKV, loads_merged=False),
        *linears(f"{block}.attn", "to_out.0"),
        merged(f"{block}.feed_forward", "gate_up_proj", ("linear_1", "linear_3"), loads_merged=False),
        renamed(f"{block}.feed_forward", "linear_2", "down_proj"),
    )


OMNIGEN_2 = Family(
    name="OmniGen2",
    model_classes=("OmniGen2Transformer2DModel",),
    layers=(
        *_block("noise_refiner.{}"),
        *_block("ref_image_refiner.{}"),
        *_block("context_refiner.{}"),
        *_block("layers.{}"),
    ),
    refusals=(
        NOT_IN_DIFFUSERS,
        RuntimeRefusal(
            VLLM_OMNI,
            f"{_NOT_AS_MODELOPT}, and nvfp4 has no other spelling there",
            methods=("nvfp4",),
            dialects=("vllm-omni", "modelopt"),
            is_final=True,
            is_loaded_here=False,
        ),
        RuntimeRefusal(
            VLLM_OMNI,
            f"{_NOT_AS_MODELOPT}; use --dialect vllm-omni",
            dialects=("modelopt",),
            is_final=True,
            is_loaded_here=False,
        ),
    ),
)
