"""FP8 through torch's scaled_mm: E4M3 codes times E4M3 codes, float32 accumulation, scales applied to the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Channel
from omni_convert.loaders.kernels.fused_activation import fp8_per_token, fp8_static
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["SCALED_MM"]


def _run(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    weight_scale = tensors["weight_scale"].reshape(1, -1)  # one, or one for each row
    if fmt.is_static:
        recipe = ScalingType.TensorWise
        input_scale = tensors["input_scale"].reshape(1, 1)
        codes = fp8_static(x, tensors["input_scale"])
    else:
        recipe = ScalingType.RowWise
        codes, input_scale = fp8_per_token(x)
        weight_scale = weight_scale.expand(1, len(tensors["weight"])).contiguous()
    # cuBLAS and CUTLASS add a bias of the output's dtype only, and write row-wise results as bf16 only.
    out = F.scaled_mm(
        codes,
        tensors["weight"].t(),
        input_scale,
        recipe,
        weight_scale,
        recipe,
        bias=None if bias is None else bias.to(torch.bfloat16),
        output_dtype=torch.bfloat16,
        use_fast_accum=True,  # as the runtimes do: Hopper's adders for FP8 are otherwise interrupted every 128 products
    )
    return out.to(x.dtype)


SCALED_MM = Kernel(
    "scaled_mm",
    is_scaled_gemm=True,
    requirements=Requirements((Fp8, Fp8Channel), devices=("cuda", "cpu"), capability=(8, 9), multiple_of=16),
    run=_run,
)
