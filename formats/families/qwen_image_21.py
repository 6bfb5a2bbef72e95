"""Qwen-Image-2.1.

Source: vLLM-Omni 0.32.0rc1, `diffusion/models/qwen_image_21/`; 0.30.0 lacks the class. Prefixes begin with
`transformer.`, and FP8 compares ignored names by substring, other methods as a whole. A plain block also builds the
Qwen3-VL encoder (`pipeline_qwen_image_21.py`); its vision tower is left out of FP8 alone, so all of it is listed.
"""

from __future__ import annotations

from omni_convert.formats.families.family import EncoderLayers, Family, GgufFacts, MethodNote
from omni_convert.formats.families.layers import QKV, VLLM_OMNI, LayerPattern, linears

__all__ = ["QWEN_IMAGE_21"]

_BLOCK = "transformer_blocks.{}"
_VISION = "model.visual"
_LANGUAGE = "model.language_model.layers.{}"


def _prefixed(leaf: str, *members: str) -> LayerPattern:
    stems = tuple(f"{_BLOCK}.{member}" for member in members or (leaf,))
    return LayerPattern(f"transformer.{_BLOCK}.{leaf}", stems, is_fused=len(members) > 1)


QWEN_IMAGE_21 = Family(
    name="Qwen-Image-2.1",
    model_classes=("QwenImage21Transformer2DModel",),
    layers=(
        _prefixed("attn.to_qkv", *(f"attn.{leaf}" for leaf in QKV)),
        _prefixed("attn.to_out.0"),
        _prefixed("img_mlp.proj"),
        _prefixed("img_mlp.gate_layer"),
        _prefixed("img_mlp.out"),
    ),
    method_notes=(
        MethodNote(
            (),
            "only vLLM-Omni 0.32.0rc1 has a class for Qwen-Image-2.1, 0.30.0 has none",
            runtimes=(VLLM_OMNI,),
        ),
    ),
    shared_encoder=EncoderLayers(
        model_types=("qwen3_vl",),
        layers=(
            *linears(f"{_LANGUAGE}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            *linears(f"{_LANGUAGE}.mlp", "gate_proj", "up_proj", "down_proj"),
            *linears(f"{_VISION}.merger", "linear_fc1", "linear_fc2"),
            *(
                layer
                for number in range(3)  # Qwen3-VL feeds the features of three layers of its vision tower
                for layer in linears(f"{_VISION}.deepstack_merger_list.{number}", "linear_fc1", "linear_fc2")
            ),
            LayerPattern("lm_head", ("lm_head",)),
        ),
        vision_layers=(
            *linears(f"{_VISION}.blocks.{{}}.attn", "qkv", "proj"),
            *linears(f"{_VISION}.blocks.{{}}.mlp", "linear_fc1", "linear_fc2"),
        ),
        stays="vLLM-Omni builds the vision tower of this text encoder quantized with some methods and not with others",
    ),
    has_original_names=True,
    gguf=GgufFacts("qwen_image21"),
)
