"""The blocks of the MX formats: elements along K that share a power-of-two scale."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e8m0 import (
    decode_e8m0,
    exponent_rules,
    is_msmodelslim,
    power_of_two,
    shared_exponent,
)
from omni_convert.formats.arithmetic.element import ElementType
from omni_convert.formats.errors import RecipeError

__all__ = [
    "COARSE_BLOCK",
    "MX_BLOCK",
    "block_amax",
    "block_error",
    "check_scale_rule",
    "dequantize_mx",
    "element_scale_mx",
    "join_blocks",
    "scale_blocks_",
    "search_exponent",
    "split_blocks",
]

#: Elements along K that share an E8M0 scale.
MX_BLOCK = 32
#: Elements along K that share the coarse scale of dual-scale MXFP4.
COARSE_BLOCK = 512


def check_scale_rule(rule: str | None, element: ElementType, method: str) -> None:
    """Refuses a rule that is not defined for the elements of a method.

    Raises:
        RecipeError: the rule is not defined for them.
    """
    known = (*exponent_rules(element), "mse")
    if rule is not None and rule not in known:
        raise RecipeError(f"--scale-rule: found {rule!r} with {method}, expected one of {', '.join(known)}")


def split_blocks(values: Tensor, block: int) -> Tensor:
    """A float32 copy in blocks along the last axis, a short last block padded with zeros.

    Args:
        values: any float dtype [..., K]
        block: elements of a block

    Returns:
        float32 [..., ceil(K / block), block]; never a view, so it may be overwritten
    """
    copy = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    missing = -values.shape[-1] % block
    if missing:
        copy = torch.nn.functional.pad(copy, (0, missing))
    return copy.view(*copy.shape[:-1], copy.shape[-1] // block, block)


def join_blocks(blocks: Tensor, columns: int) -> Tensor:
    """Inverse of `split_blocks`: [..., blocks, block] to [..., columns], without the padding."""
    return blocks.flatten(-2)[..., :columns].contiguous()


def dequantize_mx(weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers that elements [rows, K] and E8M0 bytes [rows, ceil(K / 32)] stand for, float32 [rows, K]."""
    return join_blocks(split_blocks(weight, MX_BLOCK).mul_(decode_e8m0(scale)[..., None]), weight.shape[1])


def element_scale_mx(scale: Tensor, columns: int) -> Tensor:
    """The scale of each element, float32 [rows, columns]."""
    return decode_e8m0(scale).repeat_interleave(MX_BLOCK, dim=1)[:, :columns]


def block_amax(blocks: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Largest magnitude of each block, [..., block] to [...], of a power of two elements; NaN is passed on."""
    magnitude = torch.abs(blocks, out=scratch)
    if blocks.shape[-1] >= MX_BLOCK:
        return magnitude.amax(dim=-1)
    while magnitude.shape[-1] > 1:  # torch takes twice as long to reduce short rows
        half = magnitude.shape[-1] // 2
        magnitude = torch.maximum(magnitude[..., :half], magnitude[..., half:])
    return magnitude.squeeze(-1)


def block_error(blocks: Tensor, scale: Tensor, element: ElementType, scratch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Squared rounding error of each block, in units of its squared scale.

    Args:
        blocks: float32 [..., block]
        scale: float32 [...], of each block
        element: type of the elements
        scratch: three float32 tensors of the shape of `blocks`, overwritten
    """
    scaled, rounded, work = scratch
    torch.mul(blocks, scale.reciprocal()[..., None], out=scaled)
    scaled.sub_(element.round(scaled, out=rounded, scratch=work))
    return scaled.mul_(scaled).sum(dim=-1)


def search_exponent(blocks: Tensor, element: ElementType) -> Tensor:
    """Exponent of each block with the smallest squared error.

    The floor rule may clip the largest element, one up never clips: these two are compared.

    Args:
        blocks: float32 [..., block]
        element: type of the elements

    Returns:
        int32 [...]
    """
    scratch = (torch.empty_like(blocks), torch.empty_like(blocks), torch.empty_like(blocks))
    floor = shared_exponent(block_amax(blocks, scratch[0]), "floor", element)
    up = (floor + 1).clamp_(max=127).maximum(floor)
    error_floor = block_error(blocks, power_of_two(floor), element, scratch)
    error_up = block_error(blocks, power_of_two(up), element, scratch)
    return torch.where(error_up * 4 < error_floor, up, floor)


def scale_blocks_(blocks: Tensor, element: ElementType, rule: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Divides blocks by their scales, in place; the caller rounds them.

    Args:
        blocks: float32 [..., block]
        element: type of the elements
        rule: one of `e8m0.exponent_rules(element)`, or `mse`
        dtype: of the stored numbers; the msModelSlim rules compute exponents in that precision, as that tool does

    Returns:
        exponents, int32 [...]
    """
    if rule == "mse":
        exponent = search_exponent(blocks, element)
    else:
        amax = block_amax(blocks)
        exponent = shared_exponent(amax.to(dtype) if is_msmodelslim(rule) else amax, rule, element)
    blocks.mul_(power_of_two(-exponent)[..., None])
    return exponent
