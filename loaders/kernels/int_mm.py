"""INT8 through torch's _int_mm: int8 codes times int8 codes into int32, scales applied to the result in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.format import Format
from omni_convert.formats.int8 import Int8
from omni_convert.loaders.kernels.fused_activation import int8_per_token
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["INT_MM"]

# cuBLASLt refuses 16 rows or fewer; 32 is the next multiple of 8 that tiles well.
FEWEST_CUDA_ROWS = 17
PADDED_CUDA_ROWS = 32
# On a CPU, the int32 and float32 results of so many rows and columns stay in the cache that cores share. Their memory
# is allocated once a call: to get it anew for each tile costs more than the arithmetic on it.
CPU_TILE_ROWS, CPU_TILE_COLUMNS = 512, 3072


def _run(x: Tensor, tensors: Mapping[str, Tensor], _fmt: Format, bias: Tensor | None) -> Tensor:
    weight, weight_scale = tensors["weight"], tensors["weight_scale"].reshape(1, -1)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler fuses the steps itself
        return _run_in_tiles(x, weight, weight_scale, bias)
    codes, input_scale = int8_per_token(x)
    products = _multiply(codes, weight.t())  # int32 [M, out]
    out = (products * weight_scale).mul_(input_scale)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def _run_in_tiles(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = len(x), len(weight)
    out = x.new_empty(rows, columns)
    elements = min(rows, CPU_TILE_ROWS) * min(columns, CPU_TILE_COLUMNS)
    products, scaled = torch.empty(elements, dtype=torch.int32), torch.empty(elements)
    for row in range(0, rows, CPU_TILE_ROWS):
        codes, input_scale = int8_per_token(x[row : row + CPU_TILE_ROWS])
        for column in range(0, columns, CPU_TILE_COLUMNS):
            here = slice(column, column + CPU_TILE_COLUMNS)
            target = out[row : row + CPU_TILE_ROWS, here]
            tile = products[: target.numel()].view(target.shape)
            torch._int_mm(codes, weight[here].t(), out=tile)  # noqa: SLF001  # torch has no public name for it
            result = scaled[: target.numel()].view(target.shape).copy_(tile)
            result.mul_(weight_scale[:, here]).mul_(input_scale)
            target.copy_(result if bias is None else result.add_(bias[here]))
    return out


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
