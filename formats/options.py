"""The choices that formats offer, under the names of the command line's long options. Importing it needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omni_convert.formats.arithmetic.ggml.mixtures import MIXTURES
from omni_convert.formats.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DIALECTS_OF_METHOD",
    "DIALECT_OF_METHOD",
    "GGUF_TYPES",
    "GROUP_SIZES",
    "FormatChoices",
    "FormatOptions",
    "check_group_size",
    "check_memory",
]

#: Method to the one dialect that holds it; the others are held by the default dialect.
DIALECT_OF_METHOD = {
    "w4a16": "auto-round",
    "convrot_w4a4": "comfyui",
    "w4a8": "comfyui",
    "w6a8": "comfyui",
    "nf4": "bitsandbytes",
    "svdquant_nvfp4": "vllm-omni-svdquant",
}
#: Method that the default dialect does not hold to those that do, where there are several.
DIALECTS_OF_METHOD = {"svdquant_int4": ("nunchaku", "nunchaku-lite")}
#: Columns that share a scale of w4a16, as a user may choose: those of Marlin's kernels. Others' files may have any.
GROUP_SIZES = (32, 64, 128)
MEMORY = re.compile(r"auto|full|stream(:\d+(\.\d+)?)?")
# The names alone, since `formats/schemes/gguf.py` imports torch; a test holds both equal.
GGUF_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL",
    "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "BF16", "F16",
)  # fmt: skip


def _choice(
    default: Any,
    help_text: str | None = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    dialects: Mapping[str | bool, tuple[str, ...]] | None = None,
) -> Any:
    """A field that is a long option.

    Args:
        choices: every value, if they are few
        dialects: value to the only dialects that can hold it
    """
    return field(
        default=default,
        metadata={"help": help_text, "choices": choices, "metavar": metavar, "dialects": dialects or {}},
    )


@dataclass(frozen=True, kw_only=True)
class FormatChoices:
    """The choices of a user. A format names those that it honours in `QuantizingFormat.options`."""

    input_scale: str = _choice("max", "max, mse or percentile:P.")
    weight_block_size: tuple[int, int] | None = _choice(None, "Block-wise FP8, e.g. 128,128.", metavar="N,K")
    int8_fused_scales: str = _choice("shared", choices=("shared", "per-row"))
    scale_rule: str | None = _choice(
        None, "MX exponent rule: floor, ceil, rceil, even, uos, mse, msmodelslim, auto_round.", metavar="NAME"
    )
    group_size: int | None = _choice(None, "Columns that share a scale with w4a16: 32, 64 or 128.", metavar="N")
    gguf_type: str | None = _choice(
        None,
        "Type of quantized tensors with gguf, or a mixture such as Q4_K_M. Default: Q8_0.",
        choices=(*GGUF_TYPES, *MIXTURES),
    )
    gguf_names: str | None = _choice(
        None,
        "Names of tensors with gguf. Default: original, which ComfyUI needs, if diffusers can read them too.",
        choices=("original", "diffusers"),
    )
    element: str | None = _choice(
        None,
        "Element type of fp8; e5m2 is for --dialect comfyui alone. Default: e4m3.",
        choices=("e4m3", "e5m2"),
        dialects={"e5m2": ("comfyui",)},
    )
    rotate: bool = _choice(
        False,
        "Rotate weights (ConvRot) with int8, for --dialect comfyui alone.",
        dialects={True: ("comfyui",)},
    )
    rank: int | None = _choice(None, "Rank of the branch beside SVDQuant's weights. Default: 32.", metavar="N")
    double_quant: bool = _choice(False, "Quantize the scales of nf4 too: 0.516 bytes a weight instead of 0.5625.")
    search: bool = _choice(True, "Compute scales by rule instead of searching for the best.")


@dataclass(frozen=True, kw_only=True)
class FormatOptions(FormatChoices):
    """Everything that a format is built from: the user's choices, and what follows from the model and its statistics.

    Attributes:
        static: the layer stores an `input_scale`
        smooth: the layer stores a `mul_scale`
        per_channel: each row of an FP8 weight has its own scale
        shared_in_group: an INT8 weight has one scale for its whole fused group
        importance: mean square of each input channel of a GGUF weight, float32 [in], if that is known
    """

    static: bool = False
    smooth: bool = False
    per_channel: bool = False
    shared_in_group: bool = False
    importance: Tensor | None = None


def check_group_size(size: object, where: str) -> None:
    """Accepts what a user may ask for.

    Args:
        size: None for the default
        where: the name under which the user gave it

    Raises:
        RecipeError: the size is none of `GROUP_SIZES`.
    """
    if size is not None and (type(size) is not int or size not in GROUP_SIZES):
        raise RecipeError(f"{where}: found {size!r:.40}, expected one of {', '.join(map(str, GROUP_SIZES))}")


def check_memory(choice: str, where: str) -> None:
    """Accepts how a pipeline may be held in memory.

    Args:
        where: the name under which the user gave it

    Raises:
        RecipeError: the choice is none of `auto`, `full`, `stream` and `stream:GB`.
    """
    if not MEMORY.fullmatch(choice):
        raise RecipeError(f"{where}: found '{choice}', expected auto, full, stream or stream:GB, as stream:12")
