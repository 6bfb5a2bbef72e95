"""Choice of the coarse scale of dual-scale MXFP4, jointly with the fine exponents below it.

The fine scales are powers of two, so only the position of the coarse scale inside an octave matters: a scan of the
octave finds the basin, and least squares for the rounded values moves to its bottom, between the points of the scan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1
from omni_convert.formats.arithmetic.e8m0 import power_of_two, shared_scale
from omni_convert.formats.arithmetic.mx import MX_BLOCK, block_amax, block_error, search_exponent

__all__ = ["search_coarse_scale"]

SCAN_STEPS = 16
REFINEMENTS = 1


def search_coarse_scale(groups: Tensor) -> Tensor:
    """Factor by which to multiply the coarse scale of each group.

    Args:
        groups: float32 [rows, groups, 512], divided by the coarse scale (amax 6, so that no square over- or underflows)

    Returns:
        float32 [rows, groups], in about 0.5 to 1
    """
    blocks = groups.view(*groups.shape[:-1], -1, MX_BLOCK)  # [rows, groups, 16, 32]
    amax = block_amax(blocks)
    scratch = (torch.empty_like(blocks), torch.empty_like(blocks), torch.empty_like(blocks))
    factors = [2.0 ** (-step / SCAN_STEPS) for step in range(SCAN_STEPS)]
    errors = []
    for factor in factors:
        scale = shared_scale(amax / factor, "uos", E2M1).mul_(factor)
        errors.append((block_error(blocks, scale, E2M1, scratch).mul_(scale).mul_(scale)).sum(dim=-1))
    best = torch.stack(errors).argmin(dim=0)
    factor = torch.tensor(factors, device=groups.device)[best]
    for _ in range(REFINEMENTS):
        factor = _least_squares(blocks, factor)
    return factor


def _least_squares(blocks: Tensor, factor: Tensor) -> Tensor:
    """The factor that is best for the values to which blocks round at `factor`; their error cannot grow."""
    scaled = blocks / factor[..., None, None]
    scale = power_of_two(search_exponent(scaled, E2M1))[..., None]
    rounded = E2M1.round(scaled.div_(scale)).mul_(scale)
    numerator = torch.mul(rounded, blocks, out=scaled).sum(dim=(-2, -1))
    denominator = rounded.square_().sum(dim=(-2, -1))
    return torch.where(denominator > 0, numerator / denominator, factor)
