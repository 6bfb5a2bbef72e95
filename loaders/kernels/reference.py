"""Reference: dequantize everything and multiply in float32.

It is slow, runs anywhere, and is what every other kernel is tested against.
With `bf16` activations, the input is left alone and the decoded weight is multiplied in the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import Fp8, Fp8Block
from omni_convert.formats.int8 import Int8
from omni_convert.loaders.kernels.activation import fp8_per_group, fp8_per_token, fp8_static, int8_per_token
from omni_convert.loaders.kernels.kernel import Kernel, Requirements

__all__ = ["REFERENCE", "WEIGHT_ONLY", "rounded_input"]


def _round_fp8(x: Tensor, tensors: Mapping[str, Tensor], fmt: Fp8) -> Tensor:
    if fmt.static:
        return fp8_static(x, tensors["input_scale"]).float() * tensors["input_scale"]
    codes, scale = fp8_per_token(x)
    return codes.float() * scale


def _round_fp8_block(x: Tensor, _tensors: Mapping[str, Tensor], fmt: Fp8Block) -> Tensor:
    codes, scale = fp8_per_group(x, fmt.block_size[1])
    return (codes.float() * scale).flatten(1)[:, : x.shape[1]]


def _round_int8(x: Tensor, _tensors: Mapping[str, Tensor], _fmt: Int8) -> Tensor:
    codes, scale = int8_per_token(x)
    return codes.float() * scale


_ROUND_INPUT: dict[type[Format], Callable[..., Tensor]] = {
    Fp8: _round_fp8,
    Fp8Block: _round_fp8_block,
    Int8: _round_int8,
}


def rounded_input(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """The input [M, in] as the format's runtime sees it: quantized and restored, float32."""
    return _ROUND_INPUT[type(fmt)](x, tensors, fmt)


def _run_reference(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.float()
    return F.linear(rounded_input(x, tensors, fmt), fmt.dequantize(tensors), bias).to(x.dtype)


def _run_weight_only(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, fmt.dequantize(tensors).to(x.dtype), bias)


REFERENCE = Kernel(
    "reference", is_scaled_gemm=False, requirements=Requirements(tuple(_ROUND_INPUT)), run=_run_reference
)
WEIGHT_ONLY = Kernel(
    "weight_only",
    is_scaled_gemm=False,
    requirements=Requirements((Format,), activations=("bf16",)),
    run=_run_weight_only,
)
