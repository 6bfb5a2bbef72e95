"""Verdicts of runtimes on a GGUF file, by its types, its names and its name of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, VLLM_OMNI, Verdict
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.table import FAMILIES

if TYPE_CHECKING:  # the gguf package is slow to import, and few need it
    from omni_convert.formats.containers.gguf_file import GgufReader

__all__ = ["COMFYUI_ARCHITECTURES", "DIFFUSERS_TYPES", "GUESSED", "gguf_verdicts", "has_diffusers_names"]

#: Block types that diffusers' GGUFQuantizationConfig dequantizes.
DIFFUSERS_TYPES = (
    "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
# Types that ComfyUI-GGUF dequantizes with torch; others with NumPy, in every step.
COMFYUI_TYPES = DIFFUSERS_TYPES
#: `general.architecture` of image models that ComfyUI-GGUF loads.
COMFYUI_ARCHITECTURES = (
    "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image",
    "qwen_image21",
)  # fmt: skip
#: Without an architecture, or with one of these, ComfyUI-GGUF goes by the names of tensors.
GUESSED = (None, "pig", "cow")
PLUGIN = "with vllm-gguf-plugin and its `gguf_model`; it adapts Qwen-Image, Z-Image and FLUX.2-klein"


def has_diffusers_names(architecture: str | None, names: Mapping[str, object]) -> bool:
    """Whether tensors have names that ComfyUI does not know."""
    families = [family for family in FAMILIES if architecture in family.gguf.every_architecture]
    return any(family.has_names_of_diffusers(names) for family in families)


def gguf_verdicts(file: GgufReader, family: Family | None) -> Iterator[Verdict]:
    """The verdict of each runtime on a GGUF file.

    Args:
        family: the model's family; None if no config names it
    """
    types = {entry.type.name for entry in file.entries.values()} - {"F32", "F16", "BF16"}
    unknown = ", ".join(sorted(types - {*DIFFUSERS_TYPES}))
    if unknown:
        yield Verdict(DIFFUSERS, "refuses", f"its GGUFQuantizationConfig does not know {unknown}")
    else:
        beside = "" if family is not None else "; without a config.json beside it, it guesses the model by its tensors"
        yield Verdict(DIFFUSERS, "loads", f"from_single_file with GGUFQuantizationConfig and config=FOLDER{beside}")
    yield _of_our_loader(types, family)
    yield _of_comfyui(file.architecture, file.entries, sorted(types - {*COMFYUI_TYPES}))
    if has_diffusers_names(file.architecture, file.entries):
        yield Verdict(
            "stable-diffusion.cpp", "loads", "if it knows diffusers' names of this family; written for others"
        )
    else:
        yield Verdict("stable-diffusion.cpp", "loads", "by its tensors' names; every type of ggml")
    yield _of_vllm_omni(file.architecture, file.entries, family)


def _of_our_loader(types: set[str], family: Family | None) -> Verdict:
    from omni_convert.formats.schemes.gguf import is_dequantized

    unknown = ", ".join(sorted(name for name in types if not is_dequantized(name)))
    if unknown:
        return Verdict(OURS, "refuses", f"the gguf package does not dequantize {unknown}")
    if family is None:
        return Verdict(OURS, "refuses", "no config.json")
    return Verdict(OURS, "loads", "in a pipeline's folder; packed in memory, decoded in cache")


def _of_vllm_omni(architecture: str | None, names: Mapping[str, object], family: Family | None) -> Verdict:
    if family is None or not family.gguf.has_vllm_adapter:
        return Verdict(VLLM_OMNI, "refuses", PLUGIN)
    if has_diffusers_names(architecture, names):
        return Verdict(VLLM_OMNI, "wrong", "its plugin renames from the model's own code, and spoils diffusers' names")
    return Verdict(VLLM_OMNI, "loads", PLUGIN)


def _of_comfyui(architecture: str | None, names: Mapping[str, object], slow: list[str]) -> Verdict:
    runtime = "ComfyUI-GGUF"
    if architecture not in (*COMFYUI_ARCHITECTURES, *GUESSED):
        return Verdict(runtime, "refuses", f"does not know general.architecture '{str(architecture)[:40]}'")
    if has_diffusers_names(architecture, names):
        return Verdict(runtime, "refuses", "knows the names of the model's own code, these are diffusers'")
    if slow:
        return Verdict(runtime, "loads", f"slowly: dequantizes {', '.join(slow)} with NumPy, in every step")
    return Verdict(runtime, "loads", f"as {architecture}" if architecture else "guesses the model by its tensors")
