"""INT8 through torch's _int_mm: int8 codes times int8 codes into int32, scales applied to the result in float32.

Where the weight was rotated, so are the inputs, in float32 before they are quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.arithmetic.input_codes import int8_per_token
from omni_convert.formats.arithmetic.rotation import rotate_inputs
from omni_convert.formats.arithmetic.scratch import Scratch
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.int8 import Int8, RotatedInt8
from omni_convert.loaders.kernels import fused_activation
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["INT_MM"]

# cuBLASLt refuses 16 rows or fewer; 32 is the next multiple of 8 that tiles well.
FEWEST_CUDA_ROWS = 17
PADDED_CUDA_ROWS = 32
# Elements at a time on a CPU, so that intermediates stay in cache: quantized rows in that of a core or two, codes and
# their products in that which the cores share.
CPU_QUANTIZED, CPU_ROTATED, CPU_CODES, CPU_PRODUCTS = 1 << 20, 1 << 18, 1 << 23, 1 << 21
_CODES, _RESULTS, _ROTATED = Scratch(), Scratch(), Scratch()


def _run(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    weight, weight_scale = tensors["weight"], tensors["weight_scale"].reshape(1, -1)
    group = None if fmt.encoding is None else fmt.encoding.rotation
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _without_derivative(x, weight, weight_scale, bias, group)
        return out
    return _multiply_scaled(x, weight, weight_scale, bias, group)


# An operator without a derivative raises in `backward`; the steps would give the derivative of the scales alone.
@torch.library.custom_op("omni_convert::int_mm", mutates_args=())
def _without_derivative(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int | None
) -> Tensor:
    return _multiply_scaled(x, weight, weight_scale, bias, group)


@_without_derivative.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _multiply_scaled(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int | None) -> Tensor:
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler fuses the steps itself
        return _run_in_tiles(x, weight, weight_scale, bias, group)
    codes, input_scale = fused_activation.int8_per_token(x if group is None else rotate_inputs(x, group))
    products = _multiply(codes, weight.t())  # int32 [M, out]
    result = (products * weight_scale).mul_(input_scale)
    return (result if bias is None else result.add_(bias)).to(x.dtype)


def _run_in_tiles(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: int | None) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    for rows in _tiles(len(x), CPU_CODES // x.shape[1]):
        codes, input_scale = _quantize_in_tiles(x[rows], group)
        for columns in _tiles(len(weight), CPU_PRODUCTS // len(codes)):
            target = out[rows, columns]
            products = _RESULTS.take(target.numel(), torch.int32).view(target.shape)
            torch._int_mm(codes, weight[columns].t(), out=products)  # noqa: SLF001  # torch has no public name for it
            result = products.view(torch.float32).copy_(products)  # in place
            result.mul_(weight_scale[:, columns]).mul_(input_scale)
            target.copy_(result if bias is None else result.add_(bias[columns]))
    return out


def _quantize_in_tiles(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    codes, scale = _CODES.take(x.numel(), torch.int8).view(x.shape), x.new_empty(len(x), 1, dtype=torch.float32)
    for rows in _tiles(len(x), (CPU_QUANTIZED if group is None else CPU_ROTATED) // x.shape[1]):
        tile = x[rows]
        values = _RESULTS.take(tile.numel(), torch.float32).view(tile.shape)
        if group is not None:
            rotated = _ROTATED.take(tile.numel(), torch.float32).view(tile.shape)
            tile = rotate_inputs(tile, group, (rotated, values))
        scale[rows] = int8_per_token(tile, values, codes[rows])[1]
    return codes, scale


def _tiles(count: int, most: int) -> Iterator[slice]:
    """Slices of 0..count of `most` elements, or of one if that is none."""
    step = max(1, most)
    return (slice(start, start + step) for start in range(0, count, step))


def _multiply(codes: Tensor, weight: Tensor) -> Tensor:
    rows = codes.shape[0]
    if codes.device.type == "cuda" and rows < FEWEST_CUDA_ROWS:
        return torch._int_mm(F.pad(codes, (0, 0, 0, PADDED_CUDA_ROWS - rows)), weight)[:rows]  # noqa: SLF001  # no public name
    return torch._int_mm(codes, weight)  # noqa: SLF001  # torch has no public name for it


INT_MM = Kernel(
    "int_mm",
    is_scaled_gemm=True,
    requirements=Requirements((Int8, RotatedInt8), devices=("cuda", "cpu"), capability=(7, 5), multiple_of=8),
    run=_run,
)
