"""FP8 in blocks of 128 x 128 through torch's scaled_mm: a scale for each token and 128 inputs, cuBLAS on Hopper alone.

Not run on hardware. Tests check what scaled_mm receives, and that torch's own checks of a CUDA device accept it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8Block
from omni_convert.loaders.kernels.fused_activation import fp8_per_group
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["BLOCK_SCALED_MM", "run_block"]

BLOCK = 128
# cuBLAS reads scales 16 bytes at a time: a column of them, of a token each or of a block each, is as long as that.
SCALES_AT_ONCE = 4

ScaledMm = Callable[..., Tensor]


def run_block(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    _fmt: Format,
    bias: Tensor | None,
    scaled_mm: ScaledMm = F.scaled_mm,
) -> Tensor:
    """`RunLinear`; `scaled_mm` is replaced to see what it receives."""
    rows = x.shape[0]
    codes, scale = fp8_per_group(F.pad(x, (0, 0, 0, -rows % SCALES_AT_ONCE)) if rows % SCALES_AT_ONCE else x, BLOCK)
    weight_scale = tensors["weight_scale_inv"].float()  # [out / 128, in / 128]
    out = scaled_mm(
        codes,
        tensors["weight"].t(),
        scale,
        ScalingType.BlockWise1x128,
        F.pad(weight_scale, (0, -weight_scale.shape[1] % SCALES_AT_ONCE)).t(),
        ScalingType.BlockWise128x128,
        bias=None if bias is None else bias.bfloat16(),
        output_dtype=torch.bfloat16,
    )
    return out.narrow(0, 0, rows).to(x.dtype)


BLOCK_SCALED_MM = Kernel(
    "block_scaled_mm",
    is_scaled_gemm=True,
    requirements=Requirements(
        (Fp8Block,),
        devices=("cuda",),
        capability=(9, 0),
        below_capability=(10, 0),
        cuda=(12, 9),
        block_size=(BLOCK, BLOCK),
        multiple_of=BLOCK,
    ),
    run=run_block,
)
