"""The two levels of scales of NVFP4: E4M3 for each block of 16 elements, and one float32 number above them."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1
from omni_convert.formats.arithmetic.float8 import E4M3_MAX, round_to_e4m3

__all__ = ["NVFP4_BLOCK", "NVFP4_LARGEST", "nvfp4_block_scale"]

#: Elements along K that share an E4M3 scale.
NVFP4_BLOCK = 16
#: Largest magnitude in units of the global scale.
NVFP4_LARGEST = E4M3_MAX * E2M1.largest
SMALLEST_SCALE = 2.0**-9


def nvfp4_block_scale(amax: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 scale of each block, kept in float32, as ModelOpt chooses it: amax / (6 * global scale), 1 for zeros."""
    scale = amax / (E2M1.largest * global_scale)
    scale = torch.where(scale == 0, 1.0, scale).clamp(SMALLEST_SCALE, E4M3_MAX)
    return round_to_e4m3(scale).float()
