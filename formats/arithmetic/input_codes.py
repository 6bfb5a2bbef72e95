"""How runtimes quantize the input of a linear layer, in plain torch.

The arithmetic is that of vLLM's CUDA kernels (`csrc/quantization`), in float32 throughout, so that an image made here
has the error of the served model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.arithmetic.e2m1 import E2M1, encode_e2m1, pack_nibbles
from omni_convert.formats.arithmetic.e8m0 import encode_e8m0
from omni_convert.formats.arithmetic.float8 import E4M3, E4M3_MAX, round_to_e4m3
from omni_convert.formats.arithmetic.mx import MX_BLOCK, block_amax, join_blocks, scale_blocks_, split_blocks
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK, nvfp4_block_scale

__all__ = [
    "INT8_MAX",
    "SMALLEST_GROUP_AMAX",
    "SMALLEST_INT8_AMAX",
    "SMALLEST_TOKEN_SCALE",
    "fp8_per_group",
    "fp8_per_token",
    "fp8_static",
    "int8_per_token",
    "mxfp8",
    "nvfp4",
]

INT8_MAX = 127
# Lowest per-token scale of vLLM: keeps the scale of an all-zero token above zero.
SMALLEST_TOKEN_SCALE = 1.0 / (E4M3_MAX * 512.0)
# Lowest amax of a group in vLLM's per-token-group kernel, for the same reason.
SMALLEST_GROUP_AMAX = 1e-10
#: Just below it, 127 / amax is infinite in float32; tokens that small shrink towards zero.
SMALLEST_INT8_AMAX = 4e-37


#: Rounds float32 to E4M3: `round_to_e4m3` into codes; `round_e4m3_` in place, which is faster on a CPU.
RoundToE4m3 = Callable[[Tensor], Tensor]


def fp8_static(x: Tensor, input_scale: Tensor, round_codes: RoundToE4m3 = round_to_e4m3) -> Tensor:
    """Codes, float8_e4m3fn [M, K], for one calibrated scale, float32 [] or [1]; multiplies by its inverse, as vLLM."""
    return round_codes(x.float() * input_scale.reciprocal())


def fp8_per_token(x: Tensor, round_codes: RoundToE4m3 = round_to_e4m3) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [M, K], and scales, float32 [M, 1]: vLLM's dynamic scheme where CUTLASS FP8 is available."""
    scale = (_token_amax(x).float() / E4M3_MAX).clamp(min=SMALLEST_TOKEN_SCALE)
    return round_codes(x.to(torch.float32, copy=True).div_(scale)), scale


def fp8_per_group(x: Tensor, group_size: int, round_codes: RoundToE4m3 = round_to_e4m3) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [M, G, group_size], and scales, float32 [M, G, 1]; the last group is padded with zeros."""
    padded = F.pad(x.float(), (0, -x.shape[1] % group_size))
    groups = padded.view(len(x), padded.shape[1] // group_size, group_size)
    scale = groups.abs().amax(dim=2, keepdim=True).clamp(min=SMALLEST_GROUP_AMAX) / E4M3_MAX
    return round_codes(groups / scale), scale


def int8_per_token(x: Tensor, values: Tensor | None = None, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes, int8 [M, K] in -127..127, and scales, float32 [M, 1] (0 for an all-zero token).

    Args:
        x: [M, K]
        values: float32 [M, K], memory to compute in; allocated if None
        codes: int8 [M, K], memory for the result; allocated if None
    """
    amax = _token_amax(x, values).float()
    # torch computes number / tensor as the number times a reciprocal, which rounds twice.
    inverse = torch.full_like(amax, INT8_MAX).div_(amax.clamp(min=SMALLEST_INT8_AMAX))
    values = x.to(torch.float32, copy=True) if values is None else values.copy_(x)
    rounded = values.mul_(inverse).round_()
    return rounded.to(torch.int8) if codes is None else codes.copy_(rounded), amax / INT8_MAX


def _token_amax(x: Tensor, memory: Tensor | None = None) -> Tensor:
    """Largest magnitudes, [M, 1] in the dtype of x. Their bits sort alike, and torch reduces integers faster."""
    bits = x.detach().view(torch.int16 if x.itemsize == 2 else torch.int32)
    out = None if memory is None else memory.view(bits.dtype).view(-1)[: x.numel()].view(x.shape)
    magnitudes = torch.bitwise_and(bits, torch.iinfo(bits.dtype).max, out=out)
    return magnitudes.amax(dim=1, keepdim=True).view(x.dtype)


def mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [M, K], and E8M0 scales by the floor rule, uint8 [M, ceil(K / 32)]."""
    blocks = split_blocks(x, MX_BLOCK)
    scale = encode_e8m0(scale_blocks_(blocks, E4M3, "floor"))
    return join_blocks(round_to_e4m3(blocks), x.shape[1]), scale


def nvfp4(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes, uint8 [M, K / 2], and scales, float8_e4m3fn [M, K / 16], over the static one, float32 []."""
    blocks = split_blocks(x, NVFP4_BLOCK)
    scale = nvfp4_block_scale(block_amax(blocks), input_scale)
    elements = E2M1.round(blocks.div_((scale * input_scale)[..., None]))
    return pack_nibbles(encode_e2m1(elements.flatten(1))), scale.to(torch.float8_e4m3fn)
