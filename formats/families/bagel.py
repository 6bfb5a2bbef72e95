"""BAGEL: a repository of transformers whose language model, a mixture of two experts, is quantized.

Source: vLLM-Omni 0.30.0 and 0.32.0rc1 alike, `diffusion/models/bagel/`. Prefixes begin with `bagel.`. The attention's
expert for images (`_moe_gen`) has the prefix and the method of the one for text, so that both are quantized or neither.
On CUDA one kernel multiplies both: it takes one scale for each FP8 weight, and the text's `input_scale` for all tokens.
The vision tower, the VAE, the head and the embedders are plain modules.
"""

from __future__ import annotations

from omni_convert.formats.families.family import Family, MethodNote, repository_refusal, repository_refusals
from omni_convert.formats.families.layers import VLLM_OMNI, LayerPattern, kept
from omni_convert.formats.families.stage import Fp8Refusal, Stage

__all__ = ["BAGEL"]

_DISK = "language_model.model.layers.{}"
_RUNTIME = f"bagel.{_DISK}"
_FOR_IMAGES = "_moe_gen"
_CONNECTOR = "connector: small, and all that the language model sees of a picture goes through it"


def _attention(runtime_leaf: str, *leaves: str) -> LayerPattern:
    """A linear of the attention: the parts of both experts, which share their scales."""
    members = tuple(f"{_DISK}.self_attn.{leaf}{end}" for end in ("", _FOR_IMAGES) for leaf in leaves)
    return LayerPattern(f"{_RUNTIME}.self_attn.{runtime_leaf}", members, is_fused=len(leaves) > 1)


def _mlp(end: str) -> tuple[LayerPattern, ...]:
    ours, theirs = f"{_DISK}.mlp{end}", f"{_RUNTIME}.mlp{end}"
    return (
        LayerPattern(f"{theirs}.gate_up_proj", (f"{ours}.gate_proj", f"{ours}.up_proj"), is_fused=True),
        LayerPattern(f"{theirs}.down_proj", (f"{ours}.down_proj",)),
    )


BAGEL = Family(
    name="BAGEL",
    model_classes=("BagelForConditionalGeneration",),
    layers=(
        _attention("qkv_proj", "q_proj", "k_proj", "v_proj"),
        _attention("o_proj", "o_proj"),
        *_mlp(""),
        *_mlp(_FOR_IMAGES),
        *(kept(f"connector.{leaf}", _CONNECTOR, runtime_name=f"bagel.connector.{leaf}") for leaf in ("fc1", "fc2")),
    ),
    method_notes=(
        MethodNote(
            (),
            "serve it with vLLM-Omni's bagel_single_stage.yaml: the thinker of the other deployments builds `_moe_gen` "
            "layers and the vision tower without regard to what is stored quantized, in 0.30.0 and 0.32.0rc1",
            runtimes=(VLLM_OMNI,),
        ),
    ),
    refusals=(
        repository_refusal("vLLM-Omni 0.30.0 and 0.32.0rc1 transpose INT8 weights of BAGEL twice on CUDA", ("int8",)),
        *repository_refusals(("gguf",), "vLLM-Omni has no adapter of GGUF for BAGEL"),
        repository_refusal(
            "vLLM-Omni's kernel for both experts of BAGEL takes ModelOpt's MXFP8 for FP8 with one scale",
            ("mxfp8",),
            ("modelopt",),
        ),
    ),
    stage=Stage(
        is_diffusion=True,
        fp8_refusals=(
            Fp8Refusal(
                ("row", "block"),
                "vLLM-Omni's kernel for both experts of BAGEL takes one scale for each weight",
                "leave out --weight-block-size, or use --dialect vllm-omni",
            ),
        ),
        other_weights=("ae.safetensors",),
    ),
)
