"""HunyuanImage-3.0, Instruct and distilled ones too: a repository of transformers whose diffusion model is quantized.

Source: vLLM-Omni 0.30.0 and 0.32.0rc1 alike, `diffusion/models/hunyuan_image3/`. All of `layers` but its norms gets the
config block; vision tower, VAE, embedders and head do not. On disk `qkv_proj` has the rows of q, k and v in turn for
each head of k and v, and `gate_and_up_proj` has up before gate. The loader sorts the rows of `weight` and of a
`weight_scale` of two dimensions, and gives a scale of one number to all parts.
"""

from __future__ import annotations

from omni_convert.formats.families.family import Family, MethodNote, repository_refusal, repository_refusals
from omni_convert.formats.families.layers import VLLM_OMNI, LayerPattern, kept
from omni_convert.formats.families.stage import Fp8Refusal, Stage

__all__ = ["HUNYUAN_IMAGE_3"]

_RUNTIME = "layers.{}"
_DISK = f"model.{_RUNTIME}"
_EXPERT = "mlp.experts.{}"
# Only the configs of these methods have one for stacks of experts.
_EXPERT_METHODS = ("fp8", "nvfp4")


def _layer(leaf: str, runtime_leaf: str = "", *, is_fused: bool = False) -> LayerPattern:
    return LayerPattern(f"{_RUNTIME}.{runtime_leaf or leaf}", (f"{_DISK}.{leaf}",), is_fused)


def _expert(leaf: str, *, is_fused: bool = False) -> LayerPattern:
    return LayerPattern(
        f"{_RUNTIME}.{_EXPERT}.{leaf}",
        (f"{_DISK}.{_EXPERT}.{leaf}",),
        is_fused,
        stack=f"{_RUNTIME}.mlp.experts",
        methods=_EXPERT_METHODS,
    )


HUNYUAN_IMAGE_3 = Family(
    name="HunyuanImage-3.0",
    model_classes=("HunyuanImage3ForCausalMM", "HunyuanImage3ForConditionalGeneration"),
    layers=(
        _layer("self_attn.qkv_proj", is_fused=True),
        _layer("self_attn.o_proj"),
        _layer("mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.gate_up_proj", is_fused=True),
        _layer("mlp.shared_mlp.down_proj"),
        _expert("gate_and_up_proj", is_fused=True),
        _expert("down_proj"),
        kept(
            f"{_DISK}.mlp.gate.wg",
            "router: its choice of experts decides what is computed",
            runtime_name=f"{_RUNTIME}.mlp.gate",
        ),
    ),
    refused_layers=(
        (
            f"{_DISK}.mlp.gate_and_up_proj",
            "found a block without experts (moe_layer_num_skipped), whose layers vLLM-Omni builds quantized without "
            "names, so that none could be left alone; expected experts in every block",
        ),
    ),
    method_notes=(
        MethodNote(
            (),
            "serve it with vLLM-Omni's hunyuan_image3_dit.yaml: the autoregressive stage of 0.30.0 and 0.32.0rc1 "
            "raises on scales of quantized layers",
            runtimes=(VLLM_OMNI,),
        ),
        MethodNote(
            ("int8", "mxfp8", "mxfp4"),
            "the experts, most of HunyuanImage-3.0, stay as they are: vLLM-Omni has no such method for them; "
            "fp8 and nvfp4 are there",
            runtimes=(VLLM_OMNI,),
        ),
    ),
    refusals=(
        *repository_refusals(
            ("mxfp4_dualscale", "gguf"),
            "vLLM-Omni does not load this method for HunyuanImage-3.0: its loader does not sort the rows of qkv_proj's "
            "second scales, and it has no adapter of GGUF",
        ),
        repository_refusal(
            "vLLM-Omni was not tried with ModelOpt's MXFP8 of this model; expected --dialect vllm-omni",
            ("mxfp8",),
            ("modelopt",),
        ),
    ),
    stage=Stage(
        is_diffusion=True,
        fp8_refusals=(
            Fp8Refusal(
                ("row", "block"),
                "vLLM-Omni's loader does not sort the scales of HunyuanImage-3.0's qkv_proj, if there are several",
                "leave out --weight-block-size, or use --dialect vllm-omni",
            ),
        ),
    ),
)
