"""What runtimes do with a component of each dialect, as far as their code or their users tell.

`wrong` is the dangerous one: the file loads without an error and computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omni_convert.formats.format import Format

__all__ = ["CONSUMERS", "DIFFUSERS", "OURS", "VLLM_OMNI", "Verdict", "if_incomplete", "of_lost_block", "verdicts"]

Outcome = Literal["loads", "wrong", "refuses"]

VLLM_OMNI = "vLLM-Omni 0.30"
DIFFUSERS = "diffusers 0.42"
OURS = "omni_convert.loaders"
COMFYUI = "ComfyUI"
UNMARKED = "no comfy_quant marks: it takes the codes for weights and drops the scales; --dialect comfyui adds them"
NO_BLOCK = "no block in config.json that it knows: the codes are taken for weights; -m keep --dialect vllm-omni"
SPELL_FIRST = "reads vLLM-Omni's spelling, and ModelOpt's FP8 and NVFP4: -m keep --dialect vllm-omni first"
UNKNOWN_HERE = "its quantizers do not know this quant_method"


@dataclass(frozen=True)
class Verdict:
    """What a runtime does with a component, and why."""

    runtime: str
    outcome: Outcome
    why: str


# What holds for every format of a dialect.
BY_DIALECT: dict[str, tuple[Verdict, ...]] = {
    "vllm-omni": (
        Verdict(DIFFUSERS, "loads", "after `import omni_convert.loaders`; else it does not know the quant_method"),
        Verdict(OURS, "loads", "its own spelling"),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
    "modelopt": (
        Verdict(DIFFUSERS, "refuses", "its `modelopt` is another kind of checkpoint (quant_type is missing)"),
        Verdict("SGLang", "loads", "FP8 after a build step of its own, static if there is an input_scale; NVFP4"),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
    "comfyui": (
        Verdict(VLLM_OMNI, "wrong", NO_BLOCK),
        Verdict(DIFFUSERS, "wrong", "no reader of ComfyUI's scales; omni-convert dequantize gives BF16"),
        Verdict(OURS, "refuses", SPELL_FIRST),
    ),
    "compressed-tensors": (
        Verdict(VLLM_OMNI, "refuses", "the name of the method is not in its registry; -m keep --dialect vllm-omni"),
        Verdict(DIFFUSERS, "refuses", UNKNOWN_HERE),
        Verdict("vLLM, transformers", "loads", "for language models; with compressed-tensors installed"),
        Verdict(OURS, "refuses", SPELL_FIRST),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
    "auto-round": (
        Verdict(VLLM_OMNI, "loads", "integers on CUDA and XPU, MX on XPU"),
        Verdict(DIFFUSERS, "loads", "integers, with auto-round installed; MX as dequantized BF16"),
        Verdict(OURS, "loads", "W4A16 in GPTQ's packing, the same for all layers"),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
    "transformers": (
        Verdict(
            VLLM_OMNI, "refuses", "unknown keys, or without its flag quantized online; -m keep --dialect vllm-omni"
        ),
        Verdict(DIFFUSERS, "refuses", UNKNOWN_HERE),
        Verdict("transformers", "loads", "on a GPU with FP8; elsewhere as dequantized BF16"),
        Verdict(OURS, "refuses", SPELL_FIRST),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
    "msmodelslim": (
        Verdict(VLLM_OMNI, "refuses", "reads the description for HunyuanImage-3.0 only; -m keep --dialect vllm-omni"),
        Verdict(DIFFUSERS, "refuses", "neither the names of the files nor the scales are known to it"),
        Verdict(OURS, "refuses", SPELL_FIRST),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
    "lightx2v": (
        Verdict("LightX2V", "loads", "if its run-time JSON repeats the scheme"),
        Verdict(VLLM_OMNI, "wrong", NO_BLOCK),
        Verdict(DIFFUSERS, "wrong", "scales are not known to it"),
        Verdict(OURS, "refuses", SPELL_FIRST),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
    "bfl": (
        Verdict(
            DIFFUSERS, "loads", "from_single_file with BFLQuantizationConfig, fp8 per row and nvfp4 with input_scale"
        ),
        Verdict(VLLM_OMNI, "wrong", NO_BLOCK),
        Verdict(OURS, "refuses", SPELL_FIRST),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ),
}

#: Who reads a dialect, for those who only want to say whom damage hurts.
CONSUMERS = {
    "vllm-omni": "vLLM-Omni",
    "modelopt": "vLLM-Omni, vLLM, SGLang",
    "comfyui": "ComfyUI",
    "compressed-tensors": "vLLM, transformers",
    "auto-round": "vLLM, diffusers",
    "transformers": "transformers",
    "msmodelslim": "vLLM-Ascend, MindIE",
    "lightx2v": "LightX2V",
    "bfl": "diffusers",
    "gguf": "diffusers, ComfyUI-GGUF, stable-diffusion.cpp",
}

NEEDS = {
    "fp8": "a GPU with FP8 (SM 8.9)",
    "int8": "a GPU with INT8 (SM 7.5)",
    "mxfp8": "Blackwell (SM 10.0)",
    "nvfp4": "Blackwell (SM 10.0)",
}
# What it reads of ComfyUI's; scaled FP8 without its scales, hence white images, before it was taught to.
IN_STABLE_DIFFUSION_CPP = ("fp8", "int8")
FP8_STORAGE = "fp8_storage"
# What diffusers' `bfl` quantizer reads.
IN_DIFFUSERS_BFL = ("fp8 per row", "nvfp4")
IN_OURS_OF_MODELOPT = {"fp8", "fp8 static", "fp8 per row", "nvfp4"}
ASCEND_ONLY = ("mxfp8", "mxfp4", "mxfp4_dualscale")


def verdicts(dialect: str, layers: Mapping[str, Format], refusal: str | None) -> list[Verdict]:
    """What each runtime does with a component.

    Args:
        dialect: its name
        layers: stem to format
        refusal: why vLLM-Omni refuses or misreads a component in a spelling that it knows, or None
    """
    found = list(BY_DIALECT[dialect])
    methods = {fmt.method for fmt in layers.values()}
    if dialect == "modelopt" and methods == {"fp8"}:
        found.insert(
            0, Verdict(VLLM_OMNI, "loads", "on CUDA; it dequantizes layers that it builds unquantized; not Wan")
        )
    elif dialect in ("vllm-omni", "modelopt"):
        found.insert(0, _of_vllm_omni(methods, refusal))
    if dialect == "modelopt":
        labels = {fmt.label for fmt in layers.values()}
        is_known = labels <= IN_OURS_OF_MODELOPT or (len(labels) > 1 and labels <= IN_OURS_OF_MODELOPT | {"mxfp8"})
        why = "FP8, NVFP4 and mixtures" if is_known else SPELL_FIRST
        found.append(Verdict(OURS, "loads" if is_known else "refuses", why))
    if dialect == "comfyui":
        needs = ", ".join(f"{method} on {NEEDS[method]}" for method in sorted(methods & NEEDS.keys()))
        found.insert(0, Verdict(COMFYUI, "loads", f"as it is marked; runs {needs}, else dequantizes"))
        if methods <= {*IN_STABLE_DIFFUSION_CPP}:
            found.append(
                Verdict(
                    "stable-diffusion.cpp",
                    "loads",
                    "in versions that do not drop the scales of scaled FP8 (white images)",
                )
            )
    unread = sorted({fmt.label for fmt in layers.values()} - {*IN_DIFFUSERS_BFL})
    if dialect == "bfl" and unread:
        why = f"its BFLQuantizationConfig reads {' and '.join(IN_DIFFUSERS_BFL)}, not {', '.join(unread)}"
        found = [Verdict(DIFFUSERS, "wrong", why) if each.runtime == DIFFUSERS else each for each in found]
    return found


def of_lost_block() -> list[Verdict]:
    """What each runtime does with a component that we wrote, and whose config.json lost its block."""
    why = "config.json lost its quantization_config; restore the file, or convert again"
    return [
        Verdict(VLLM_OMNI, "wrong", f"takes the codes for weights: {why}"),
        Verdict(DIFFUSERS, "wrong", f"takes the codes for weights: {why}"),
        Verdict(OURS, "refuses", why),
        Verdict(COMFYUI, "wrong", UNMARKED),
    ]


def if_incomplete(found: Sequence[Verdict], dialect: str, reason: str, *, is_scale: bool) -> list[Verdict]:
    """The same of a component of which something is missing, or too much.

    Args:
        reason: what it is
        is_scale: it is a scale, which vLLM-Omni leaves unset with a warning
    """
    # Our loader reads its own spelling for diffusers.
    strict = {OURS, *(() if is_scale else (VLLM_OMNI,)), *((DIFFUSERS,) if dialect == "vllm-omni" else ())}

    def of(verdict: Verdict) -> Verdict:
        if verdict.outcome != "loads":
            return verdict
        return Verdict(verdict.runtime, "refuses" if verdict.runtime in strict else "wrong", reason)

    return [of(verdict) for verdict in found]


def _of_vllm_omni(methods: set[str], refusal: str | None) -> Verdict:
    if FP8_STORAGE in methods:
        return Verdict(VLLM_OMNI, "wrong", "quantizes encoders and VAEs in memory only, and takes codes for weights")
    if refusal is not None:
        return Verdict(VLLM_OMNI, "wrong", refusal)
    ascend = sorted(methods & {*ASCEND_ONLY})
    if ascend:
        return Verdict(VLLM_OMNI, "loads", f"{', '.join(ascend)} on Ascend 950 only")
    return Verdict(VLLM_OMNI, "loads", "nvfp4 on Blackwell" if "nvfp4" in methods else "on CUDA")
