"""The conversions that `same_bytes.py` compares: a tiny model of every family with every method and dialect; the demo.

A case may read the output of another one. Families in `DETAILED` are also re-encoded from each dialect into the others,
and converted with each option.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tiny_models import MODELS, OTHERS, PIPELINES  # type: ignore[import-not-found]  # beside it

METHODS = {
    "fp8": ("-m", "fp8"),
    "fp8_blocks": ("-m", "fp8", "--weight-block-size", "128,128"),
    "int8": ("-m", "int8"),
    "mxfp8": ("-m", "mxfp8"),
    "mxfp4": ("-m", "mxfp4"),
    "mxfp4_dualscale": ("-m", "mxfp4_dualscale"),
    "nvfp4": ("-m", "nvfp4"),
    "w4a16": ("-m", "w4a16", "--group-size", "32"),
}
DIALECTS = ("vllm-omni", "modelopt", "comfyui", "compressed-tensors", "transformers", "auto-round", "msmodelslim")
GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "BF16", "F16")
SCALE_RULES = ("floor", "ceil", "rceil", "even", "uos", "mse", "msmodelslim", "auto_round")
#: Options with a method of its own each.
OPTIONS = {
    **{f"mxfp8.{rule}": ("-m", "mxfp8", "--scale-rule", rule) for rule in SCALE_RULES},
    **{f"mxfp4.{rule}": ("-m", "mxfp4", "--scale-rule", rule) for rule in SCALE_RULES},
    **{f"{method}.no_search": (*METHODS[method], "--no-search") for method in METHODS},
    "int8.per_row": ("-m", "int8", "--int8-fused-scales", "per-row"),
    "w4a16.128": ("-m", "w4a16", "--group-size", "128"),
    "fp8.ignored": ("-m", "fp8", "--ignored-layers", "*to_out*", "--ignored-layers", "*.w2"),
    "fp8.ignored_modelopt": ("-m", "fp8", "--dialect", "modelopt", "--ignored-layers", "*to_out*"),
    "fp8.unmatched": ("-m", "fp8", "--ignored-layers", "no_such_layer"),
    "fp8.recommended": ("-m", "fp8", "--recommended"),
    "fp8.bf16_blocks": ("-m", "fp8", "--bf16-blocks", "1"),
    "mxfp4_dualscale.no_bf16_blocks": ("-m", "mxfp4_dualscale", "--bf16-blocks", "0"),
    "fp8.float32": ("-m", "fp8", "--dtype", "float32"),
    "fp8.shards": ("-m", "fp8", "--max-shard-size", "200KB"),
    "nvfp4.shards": ("-m", "nvfp4", "--dialect", "modelopt", "--max-shard-size", "100KB"),
    "mxfp4_dualscale.forced": ("-m", "mxfp4_dualscale", "--force"),
    "nvfp4.comfyui_diffusers": ("-m", "nvfp4", "--dialect", "comfyui", "--runtime", "diffusers"),
    "gguf.diffusers_names": ("-m", "gguf", "--gguf-names", "diffusers"),
    "gguf.diffusers_scope": ("-m", "gguf", "--runtime", "diffusers"),
}
COMPONENTS = {
    "encoder_fp8": ("-m", "fp8", "--component", "text_encoder=fp8"),
    "encoder_int8": ("-m", "mxfp8", "--component", "text_encoder=int8"),
    "encoder_stored": ("-m", "fp8", "--component", "text_encoder=fp8_storage", "--runtime", "diffusers"),
    "encoder_stored_elsewhere": ("-m", "fp8", "--component", "text_encoder=fp8_storage"),
    "vae_stored": ("-m", "int8", "--component", "vae=fp8_storage", "--runtime", "diffusers"),
    "one_expert": ("-m", "fp8", "--component", "transformer_2=none"),
    "two_methods": ("-m", "fp8", "--component", "transformer_2=int8"),
    "encoder_gguf": ("-m", "gguf", "--component", "text_encoder=fp8"),
    "no_such_component": ("-m", "fp8", "--component", "transformr=fp8"),
}
#: Families whose layout differs most: for these each file is re-encoded in each dialect, and each option is tried.
DETAILED = ("z_image", "qwen_image", "flux_1", "flux_2", "wan")
#: Families whose tiny models diffusers reads under the names of the model's own code → what published files put before.
RENAMED = {
    "z_image": "model.diffusion_model.",
    "flux_2": "",
    "wan": "model.diffusion_model.",
    "ltx_video": "model.diffusion_model.",
}


@dataclass(frozen=True)
class Case:
    """One conversion.

    Attributes:
        name: its folder
        source: name of a model, or of a case whose output is read; "" for the demo
        arguments: of `convert`, without the model and the output
        file: pattern of the one file of `source` to read, instead of its folder
        is_verified: whether `inspect` and `verify` read the output as well
    """

    name: str
    source: str
    arguments: tuple[str, ...]
    file: str = ""
    is_verified: bool = True


def every_case() -> Iterator[Case]:
    yield from demo_cases()
    for model in (*MODELS, *OTHERS):
        yield from written_cases(model)
        if model in DETAILED:
            yield from option_cases(model)
            yield from transcoded_cases(model)
        if model in RENAMED:
            yield from original_cases(model)
    for pipeline in PIPELINES:
        yield Case(f"{pipeline}/fp8", pipeline, METHODS["fp8"])
        yield Case(f"{pipeline}/gguf", pipeline, ("-m", "gguf"))
        for name, arguments in COMPONENTS.items():
            yield Case(f"{pipeline}/{name}", pipeline, arguments)


def demo_cases() -> Iterator[Case]:
    """The demo runs, so that it can be calibrated as well."""
    statistics = ("--calibration", "calibration/statistics.safetensors")
    moments = ("--moments", "calibration/moments.safetensors")
    for method, arguments in METHODS.items():
        yield Case(f"demo/{method}", "", arguments)
        yield Case(f"demo/{method}.static", "", (*arguments, *statistics))
        yield Case(f"demo/{method}.gptq", "", (*arguments, *statistics, *moments))
    for rule in ("mse", "percentile:99"):
        yield Case(f"demo/fp8.{rule}", "", ("-m", "fp8", *statistics, "--input-scale", rule))
    for dialect in DIALECTS[1:]:
        for method in ("fp8", "nvfp4", "mxfp4"):
            arguments = (*METHODS[method], *statistics, "--dialect", dialect)
            yield Case(f"demo/{method}.static.{dialect}", "", arguments)
    for kind in GGUF_TYPES:
        yield Case(f"demo/gguf.{kind}", "", ("-m", "gguf", "--gguf-type", kind))
    for name, arguments in COMPONENTS.items():
        yield Case(f"demo/{name}", "", arguments)
    yield Case("demo/fp8.lora", "", ("-m", "fp8", "--lora", "models/lora.safetensors:0.5"))
    yield Case("demo/keep.lora", "", ("-m", "keep", "--lora", "models/lora.safetensors"))


def written_cases(model: str) -> Iterator[Case]:
    """Each method in each dialect, for our own loader as well, and each type of GGUF."""
    for method, arguments in METHODS.items():
        for dialect in DIALECTS:
            yield Case(f"{model}/{method}.{dialect}", model, (*arguments, "--dialect", dialect))
        yield Case(f"{model}/{method}.diffusers", model, (*arguments, "--runtime", "diffusers"))
        source = f"{model}/{method}.vllm-omni"
        yield Case(f"{model}/dequantize.{method}.vllm-omni", source, ("-m", "dequantize"), is_verified=False)
    for kind in GGUF_TYPES:
        yield Case(f"{model}/gguf.{kind}", model, ("-m", "gguf", "--gguf-type", kind))
    yield Case(f"{model}/dequantize.gguf", f"{model}/gguf.Q8_0", ("-m", "dequantize"), is_verified=False)
    yield Case(f"{model}/fp8_of_gguf", f"{model}/gguf.Q8_0", METHODS["fp8"], "*.gguf")


def option_cases(model: str) -> Iterator[Case]:
    for name, arguments in OPTIONS.items():
        yield Case(f"{model}/option.{name}", model, arguments)


def transcoded_cases(model: str) -> Iterator[Case]:
    """Brings the output of one dialect into the others and into BF16, and quantizes it again."""
    for method in METHODS:
        for dialect in DIALECTS:
            source = f"{model}/{method}.{dialect}"
            for other in DIALECTS:
                if other != dialect and "vllm-omni" in (dialect, other):
                    arguments = ("-m", "keep", "--dialect", other)
                    yield Case(f"{model}/keep.{method}.{dialect}.{other}", source, arguments, is_verified=False)
            if dialect != "vllm-omni":
                name = f"{model}/dequantize.{method}.{dialect}"
                yield Case(name, source, ("-m", "dequantize"), is_verified=False)
    yield Case(f"{model}/mxfp8_of_fp8", f"{model}/fp8.vllm-omni", METHODS["mxfp8"])
    yield Case(f"{model}/gguf_of_int8", f"{model}/int8.vllm-omni", ("-m", "gguf"))


def original_cases(model: str) -> Iterator[Case]:
    """Single files with the names of the model's own code."""
    source = f"models/{model}_original/{model}.safetensors"
    for method, arguments in METHODS.items():
        yield Case(f"{model}/original.{method}", source, arguments)
        yield Case(f"{model}/original.{method}.comfyui", source, (*arguments, "--dialect", "comfyui"))
        file = f"{model}/original.{method}.comfyui"
        yield Case(f"{model}/keep_original.{method}", file, ("-m", "keep"), "*.safetensors", is_verified=False)
    yield Case(f"{model}/original.gguf", source, ("-m", "gguf"))
