"""Model families as data: which linears vLLM-Omni builds quantized, how it calls and merges them, what to leave alone.

`{}` stands for a block's number. Names are relative to the component. Facts are those of vLLM-Omni 0.30.0's model
classes; a layer that is not listed here must never be stored quantized for that runtime: its weight would be read
without its scales.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["FAMILIES", "EncoderLayers", "FamilyFacts", "LayerPattern", "MethodNote", "Recommendation", "VariantRefusal"]

VLLM_OMNI = "vllm-omni"
DIFFUSERS = "diffusers"
EVERY_RUNTIME = (VLLM_OMNI, DIFFUSERS)

MXFP4_METHODS = ("mxfp4", "mxfp4_dualscale")
FLOAT_METHODS = ("fp8", "mxfp8", *MXFP4_METHODS, "nvfp4")


@dataclass(frozen=True)
class LayerPattern:
    """One linear of a block, or several that the runtime merges into one.

    Attributes:
        runtime_name: the layer's prefix in the runtime
        members: state-dict stems, in the order in which the runtime stacks them
        is_fused: the runtime's layer has several logical widths, each with a slot for a scale
        loads_merged: a checkpoint may also hold the members already merged, under the runtime's name
        runtimes: whose scope the layer is in
        keep_reason: why the layer stays as it is although the runtime builds it quantized, or None
    """

    runtime_name: str
    members: tuple[str, ...]
    is_fused: bool = False
    loads_merged: bool = False
    runtimes: tuple[str, ...] = EVERY_RUNTIME
    keep_reason: str | None = None


@dataclass(frozen=True)
class Recommendation:
    """Layers that are better left alone, as an `--ignored-layers` pattern, and why."""

    pattern: str
    reason: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class MethodNote:
    """What a user of some methods should know about a family.

    Attributes:
        methods: all, if there are none
        layer: only models that have this one are meant; "" for the whole family
    """

    methods: tuple[str, ...]
    text: str
    layer: str = ""


@dataclass(frozen=True)
class VariantRefusal:
    """A model of the family that some methods harm too much, told by a value in its config."""

    config_key: str
    config_value: object
    methods: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class EncoderLayers:
    """Linears of a text encoder that the runtime builds from the transformer's config block.

    Attributes:
        model_types: the encoders (`model_type` of their config) for which it does so; empty for all
        per_layer: runtime and state-dict names of the linears of a decoder layer
        others: names of linears outside the layers
    """

    model_types: tuple[str, ...]
    per_layer: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyFacts:
    """Everything known about one family.

    Attributes:
        unsupported: runtime to the reason why none of the family's layers may be stored quantized for it
        unsupported_methods: runtime and method to the reason why the runtime cannot load the family in that method
        refused_variants: models of the family that a method harms too much
        bf16_blocks: method to the number of leading blocks that the runtime's own quantizing leaves in BF16
    """

    name: str
    model_classes: tuple[str, ...]
    layers: tuple[LayerPattern, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    notes: tuple[MethodNote, ...] = ()
    shared_encoder: EncoderLayers | None = None
    unsupported: tuple[tuple[str, str], ...] = ()
    unsupported_methods: tuple[tuple[str, str, str], ...] = ()
    refused_variants: tuple[VariantRefusal, ...] = ()
    bf16_blocks: tuple[tuple[str, int], ...] = ()


def _linears(parent: str, *leaves: str, runtimes: tuple[str, ...] = EVERY_RUNTIME) -> tuple[LayerPattern, ...]:
    """Linears that the runtime calls as the checkpoint does."""
    return tuple(LayerPattern(f"{parent}.{leaf}", (f"{parent}.{leaf}",), runtimes=runtimes) for leaf in leaves)


def _renamed(parent: str, leaf: str, runtime_leaf: str) -> LayerPattern:
    return LayerPattern(f"{parent}.{runtime_leaf}", (f"{parent}.{leaf}",))


def _merged(
    parent: str,
    runtime_leaf: str,
    leaves: Iterable[str],
    *,
    loads_merged: bool = True,
    runtimes: tuple[str, ...] = EVERY_RUNTIME,
) -> LayerPattern:
    members = tuple(f"{parent}.{leaf}" for leaf in leaves)
    return LayerPattern(f"{parent}.{runtime_leaf}", members, True, loads_merged, runtimes)


def _kept(stem: str, reason: str) -> LayerPattern:
    """A linear that vLLM-Omni would run quantized, and that is better left alone."""
    return LayerPattern(stem, (stem,), runtimes=(VLLM_OMNI,), keep_reason=reason)


QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _z_image_block(block: str, runtimes: tuple[str, ...] = EVERY_RUNTIME) -> tuple[LayerPattern, ...]:
    return (
        _merged(f"{block}.attention", "to_qkv", QKV, runtimes=runtimes),
        *_linears(f"{block}.attention", "to_out.0", runtimes=runtimes),
        _merged(f"{block}.feed_forward", "w13", ("w1", "w3"), loads_merged=False, runtimes=runtimes),
        *_linears(f"{block}.feed_forward", "w2", runtimes=runtimes),
    )


Z_IMAGE = FamilyFacts(
    name="Z-Image",
    model_classes=("ZImageTransformer2DModel",),
    layers=(
        *_z_image_block("noise_refiner.{}"),
        *_z_image_block("context_refiner.{}"),
        *_z_image_block("siglip_refiner.{}", (DIFFUSERS,)),  # only in models that also see pictures
        *_z_image_block("layers.{}"),
    ),
    notes=(
        MethodNote(
            ("fp8",),
            "vLLM-Omni's own FP8 quality gate for Z-Image-Turbo keeps the last 15 of its 30 layers in BF16; "
            "for that: --ignored-layers 'layers.1[5-9].*' --ignored-layers 'layers.2?.*'",
            layer="layers.29.attention.to_q",
        ),
    ),
    shared_encoder=EncoderLayers(
        model_types=(),
        per_layer=tuple(
            f"model.layers.{{}}.{leaf}"
            for leaf in (
                *(f"self_attn.{part}_proj" for part in "qkvo"),
                *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            )
        ),
        others=("lm_head",),
    ),
)

_DOUBLE_STREAM_ATTENTION = (
    _merged("transformer_blocks.{}.attn", "to_qkv", QKV),
    *_linears("transformer_blocks.{}.attn", "to_out.0"),
    _merged("transformer_blocks.{}.attn", "add_kv_proj", ADDED_QKV),
    *_linears("transformer_blocks.{}.attn", "to_add_out"),
)

QWEN_IMAGE = FamilyFacts(
    name="Qwen-Image",
    model_classes=("QwenImageTransformer2DModel",),
    layers=(
        *_DOUBLE_STREAM_ATTENTION,
        *_linears("transformer_blocks.{}.img_mlp", "net.0.proj", "net.2"),
        *_linears("transformer_blocks.{}.txt_mlp", "net.0.proj", "net.2"),
    ),
    recommendations=(
        Recommendation(
            "img_mlp",
            "vLLM-Omni's guides disagree: the FP8 one keeps the image-stream MLPs in BF16 where quality regresses, "
            "because their inputs change over the denoising steps; the INT8 one quantizes every layer",
            methods=FLOAT_METHODS,
        ),
    ),
)

FLUX_1 = FamilyFacts(
    name="FLUX.1",
    model_classes=("FluxTransformer2DModel",),
    layers=(
        _merged("single_transformer_blocks.{}.attn", "to_qkv", QKV, loads_merged=False),
        *_linears("single_transformer_blocks.{}", "proj_mlp", "proj_out"),
        _merged("transformer_blocks.{}.attn", "to_qkv", QKV, loads_merged=False, runtimes=(DIFFUSERS,)),
        _merged("transformer_blocks.{}.attn", "add_kv_proj", ADDED_QKV, loads_merged=False, runtimes=(DIFFUSERS,)),
        *_linears("transformer_blocks.{}.attn", "to_out.0", "to_add_out", runtimes=(DIFFUSERS,)),
        *_linears("transformer_blocks.{}.ff", "net.0.proj", "net.2", runtimes=(DIFFUSERS,)),
        *_linears("transformer_blocks.{}.ff_context", "net.0.proj", "net.2", runtimes=(DIFFUSERS,)),
    ),
    notes=(
        MethodNote(
            (),
            "vLLM-Omni runs only the single blocks of FLUX.1 quantized; --runtime diffusers quantizes the double "
            "blocks as well, for omni_convert.loaders alone",
        ),
    ),
)

FLUX_2 = FamilyFacts(
    name="FLUX.2",
    model_classes=("Flux2Transformer2DModel",),
    layers=(
        *_DOUBLE_STREAM_ATTENTION,
        # One tensor of two halves (gate, up) on disk, and two logical widths in the runtime.
        LayerPattern("transformer_blocks.{}.ff.linear_in", ("transformer_blocks.{}.ff.linear_in",), is_fused=True),
        *_linears("transformer_blocks.{}.ff", "linear_out"),
        LayerPattern(
            "transformer_blocks.{}.ff_context.linear_in", ("transformer_blocks.{}.ff_context.linear_in",), is_fused=True
        ),
        *_linears("transformer_blocks.{}.ff_context", "linear_out"),
        *_linears("single_transformer_blocks.{}.attn", "to_qkv_mlp_proj", "to_out"),
    ),
    # FLUX.2-dev; the Qwen3 encoder of klein is a plain transformers module.
    shared_encoder=EncoderLayers(
        model_types=("mistral3", "mistral"),
        per_layer=tuple(
            f"text_encoder.language_model.model.layers.{{}}.{leaf}"
            for leaf in (
                *(f"self_attn.{part}_proj" for part in ("qkv", "q", "k", "v", "o")),
                *(f"mlp.{part}_proj" for part in ("gate_up", "gate", "up", "down")),
            )
        ),
    ),
)

HUNYUAN_VIDEO_15 = FamilyFacts(
    name="HunyuanVideo-1.5",
    model_classes=("HunyuanVideo15Transformer3DModel",),
    layers=(
        *_DOUBLE_STREAM_ATTENTION,
        *_linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        *_linears("transformer_blocks.{}.ff_context", "net.0.proj", "net.2"),
    ),
)


def _wan_block(block: str) -> tuple[LayerPattern, ...]:
    return (
        _merged(f"{block}.attn1", "to_qkv", QKV),
        _renamed(f"{block}.attn1", "to_out.0", "to_out"),
        *_linears(f"{block}.attn1", "to_gate_compress"),
        *_linears(f"{block}.attn2", *QKV, "add_k_proj", "add_v_proj"),
        _renamed(f"{block}.attn2", "to_out.0", "to_out"),
        _renamed(f"{block}.ffn", "net.0.proj", "net_0.proj"),
        _renamed(f"{block}.ffn", "net.2", "net_2"),
    )


WAN = FamilyFacts(
    name="Wan",
    model_classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    layers=(*_wan_block("blocks.{}"), *_wan_block("vace_blocks.{}")),
    refused_variants=(
        VariantRefusal(
            "in_channels",
            48,
            MXFP4_METHODS,
            "4-bit activations harm Wan2.2-TI2V-5B too much, vLLM-Omni's own converter leaves it out",
        ),
    ),
    bf16_blocks=(("mxfp4_dualscale", 5),),
    unsupported_methods=(
        (
            VLLM_OMNI,
            "nvfp4",
            "vLLM-Omni 0.30.0 cannot load ModelOpt blocks (nvfp4) for Wan; on CUDA use fp8",
        ),
    ),
)

_EMBEDS_CONDITION = "embedder: runs once per picture and feeds every block"

GLM_IMAGE = FamilyFacts(
    name="GLM-Image",
    model_classes=("GlmImageTransformer2DModel",),
    layers=(
        _merged("transformer_blocks.{}.attn1", "to_qkv", QKV, loads_merged=False),
        *_linears("transformer_blocks.{}.attn1", "to_out.0"),
        *_linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        _kept("transformer_blocks.{}.norm1.linear", "modulation: its few outputs scale and shift whole layers"),
        _kept("glyph_projector.net.0.proj", _EMBEDS_CONDITION),
        _kept("glyph_projector.net.2", _EMBEDS_CONDITION),
        _kept("prior_projector.net.0.proj", _EMBEDS_CONDITION),
        _kept("prior_projector.net.2", _EMBEDS_CONDITION),
    ),
)

_LTX_2_UNMERGED = ("audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

LTX_2 = FamilyFacts(
    name="LTX-2",
    model_classes=("LTX2VideoTransformer3DModel",),
    layers=(
        _merged("transformer_blocks.{}.attn1", "to_qkv", QKV),
        *_linears("transformer_blocks.{}.attn1", "to_out.0"),
        *(
            layer
            for attention in _LTX_2_UNMERGED
            for layer in _linears(f"transformer_blocks.{{}}.{attention}", *QKV, "to_out.0")
        ),
        *_linears("transformer_blocks.{}.ff", "net.0.proj", "net.2"),
        *_linears("transformer_blocks.{}.audio_ff", "net.0.proj", "net.2"),
    ),
)

_FULL_PRECISION = "vLLM-Omni 0.30.0 builds every layer of this model in full precision"
_NOT_TABULATED = "which layers vLLM-Omni builds quantized for this model is not known here"

# For these the generic rule holds in our own loader, and nothing may be quantized for the other runtime.
_ONLY_DIFFUSERS = (
    ("Stable Diffusion 3", "SD3Transformer2DModel", _FULL_PRECISION),
    ("SDXL", "UNet2DConditionModel", _FULL_PRECISION),
    ("LongCat-Image", "LongCatImageTransformer2DModel", _FULL_PRECISION),
    ("Ovis-Image", "OvisImageTransformer2DModel", _FULL_PRECISION),
    ("SANA-Video", "SanaVideoTransformer3DModel", _FULL_PRECISION),
    (
        "Helios",
        "HeliosTransformer3DModel",
        "vLLM-Omni 0.30.0 builds this model's linears without names, so that no layer could be left in BF16",
    ),
    ("ERNIE-Image", "ErnieImageTransformer2DModel", _NOT_TABULATED),
    ("HiDream-I1", "HiDreamImageTransformer2DModel", _NOT_TABULATED),
    ("Krea 2", "Krea2Transformer2DModel", _NOT_TABULATED),
    ("MiniMax-H3", "MiniMaxH3Transformer3DModel", _NOT_TABULATED),
    ("SANA-WM", "SanaWMTransformer3DModel", _NOT_TABULATED),
)

FAMILIES: tuple[FamilyFacts, ...] = (
    Z_IMAGE,
    QWEN_IMAGE,
    FLUX_1,
    FLUX_2,
    HUNYUAN_VIDEO_15,
    WAN,
    GLM_IMAGE,
    LTX_2,
    *(
        FamilyFacts(name, (model_class,), unsupported=((VLLM_OMNI, reason),))
        for name, model_class, reason in _ONLY_DIFFUSERS
    ),
)
