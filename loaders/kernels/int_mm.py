"""INT8 through torch's _int_mm: int8 codes times int8 codes into int32, scales applied to the result in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.format import Format
from omni_convert.formats.int8 import Int8
from omni_convert.loaders.kernels.activation import int8_per_token
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["INT_MM"]

# cuBLASLt refuses 16 rows or fewer; 32 is the next multiple of 8 that tiles well.
FEWEST_CUDA_ROWS = 17
PADDED_CUDA_ROWS = 32
# On a CPU, the float32 and int32 intermediates of this many rows stay in cache, and their memory is reused.
CPU_TILE_ROWS = 256


def _run(x: Tensor, tensors: Mapping[str, Tensor], _fmt: Format, bias: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or x.shape[0] <= CPU_TILE_ROWS:
        return _run_tile(x, tensors, bias)
    return torch.cat([_run_tile(tile, tensors, bias) for tile in torch.split(x, CPU_TILE_ROWS)])


def _run_tile(x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    codes, input_scale = int8_per_token(x)
    products = _multiply(codes, tensors["weight"].t())  # int32 [M, out]
    out = (products * tensors["weight_scale"].reshape(1, -1)).mul_(input_scale)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def _multiply(codes: Tensor, weight: Tensor) -> Tensor:
    rows = codes.shape[0]
    if codes.device.type == "cuda" and rows < FEWEST_CUDA_ROWS:
        return torch._int_mm(F.pad(codes, (0, 0, 0, PADDED_CUDA_ROWS - rows)), weight)[:rows]  # noqa: SLF001  # no public name
    return torch._int_mm(codes, weight)  # noqa: SLF001  # torch has no public name for it


INT_MM = Kernel(
    "int_mm",
    is_scaled_gemm=True,
    requirements=Requirements((Int8,), devices=("cuda", "cpu"), capability=(7, 5), multiple_of=8),
    run=_run,
)
