"""The behaviour of runtimes on a quantized component, as their code or their users show it.

`wrong` is the dangerous outcome: the file loads without an error and the runtime computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "COMFYUI",
    "CONVERT_FIRST",
    "DIFFUSERS",
    "KEEP",
    "NOT_OF_DIFFUSERS",
    "NO_BLOCK",
    "OPENED",
    "OURS",
    "REQUANTIZE",
    "UNKNOWN_METHOD",
    "UNMARKED",
    "VLLM_OMNI",
    "VLLM_OMNI_CANDIDATE",
    "Verdict",
    "if_incomplete",
    "lost_block_verdicts",
    "with_remedy",
    "without_class",
]

# The usual remedy, and the one for components that no dialect can hold as they are.
KEEP, REQUANTIZED = "-m keep --dialect vllm-omni", "-m METHOD quantizes again"

Outcome = Literal["loads", "wrong", "refuses"]

VLLM_OMNI = "vLLM-Omni 0.30"
VLLM_OMNI_CANDIDATE = "vLLM-Omni 0.32.0rc1"
DIFFUSERS = "diffusers 0.42"
OURS = "omni_convert.loaders"
COMFYUI = "ComfyUI"


@dataclass(frozen=True)
class Verdict:
    """The behaviour of a runtime on a component, the reason, and the options of omni-convert that help."""

    runtime: str
    outcome: Outcome
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.why, self.remedy)))


#: Verdicts that several dialects share.
UNMARKED = Verdict(
    COMFYUI,
    "wrong",
    "no comfy_quant marks: it takes the codes for weights and drops the scales",
    "--dialect comfyui adds them",
)
NO_BLOCK = Verdict(VLLM_OMNI, "wrong", "no block in config.json that it knows: the codes are taken for weights", KEEP)
UNKNOWN_METHOD = Verdict(DIFFUSERS, "refuses", "its quantizers do not know this quant_method")
CONVERT_FIRST = Verdict(OURS, "refuses", "reads vLLM-Omni's spelling, and ModelOpt's FP8 and NVFP4", KEEP)
OPENED = Verdict(OURS, "loads", "load_pipeline alone, as the denoising model of a pipeline of diffusers")
NOT_OF_DIFFUSERS = Verdict(OURS, "refuses", "runs models of diffusers, and this is a repository of transformers")
REQUANTIZE = Verdict(OURS, "refuses", "does not read it", f"{REQUANTIZED}, omni-convert dequantize gives BF16")


def without_class(found: Iterable[Verdict], reason: str) -> list[Verdict]:
    """The verdicts on a component whose model diffusers has no class for."""
    return [Verdict(each.runtime, "refuses", reason) if each.runtime in (DIFFUSERS, OURS) else each for each in found]


def with_remedy(found: Iterable[Verdict], keep: Callable[[str], str | None]) -> list[Verdict]:
    """The verdicts, with the options that keep every value of this component in place of the usual ones.

    Args:
        keep: runtime to these options; None if there are none
    """
    return [replace(each, remedy=keep(each.runtime) or REQUANTIZED) if each.remedy == KEEP else each for each in found]


def lost_block_verdicts() -> list[Verdict]:
    """The verdicts on a component that we wrote and whose config.json has lost its block."""
    why = "config.json lost its quantization_config; restore the file, or convert again"
    return [
        Verdict(VLLM_OMNI, "wrong", f"takes the codes for weights: {why}"),
        Verdict(DIFFUSERS, "wrong", f"takes the codes for weights: {why}"),
        Verdict(OURS, "refuses", why),
        UNMARKED,
    ]


def if_incomplete(found: Iterable[Verdict], strict: Collection[str], reason: str) -> list[Verdict]:
    """The verdicts on a component that lacks a tensor or has one too many.

    Args:
        found: the verdicts if it were complete
        strict: runtimes that refuse it; others load it without a word
        reason: what is missing, or without a use
    """
    return [
        replace(verdict, outcome="refuses" if verdict.runtime in strict else "wrong", why=reason)
        if verdict.outcome == "loads"
        else verdict
        for verdict in found
    ]
