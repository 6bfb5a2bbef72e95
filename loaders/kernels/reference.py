"""Reference: dequantize everything and multiply in float32.

It is slow, runs anywhere, and is what every other kernel is tested against.
With `bf16` activations, the input is left alone and the decoded weight is multiplied in the dtype of the input. That is
also all there is to W4A16, and to an nvfp4 layer without input_scale, which the runtime runs alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from omni_convert.formats.format import Format
from omni_convert.loaders.kernels.kernel import Kernel, Requirements, rounded_input
from omni_convert.loaders.memory.layout import disk_tensors

__all__ = ["REFERENCE", "WEIGHT_ONLY"]


def _stored_weight(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """The weight that the runtime's GEMM sees, float32 [out, in]."""
    return fmt.multiplied(disk_tensors(fmt, tensors, x.shape[1]))


def _run_reference(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.float()
    out = F.linear(rounded_input(x, tensors, fmt), _stored_weight(x, tensors, fmt), bias)
    side = fmt.side_product(x.float(), tensors)
    return (out if side is None else out + side).to(x.dtype)


def _run_weight_only(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    weight = fmt.dequantize(disk_tensors(fmt, tensors, x.shape[1]))
    return F.linear(x, weight.to(x.dtype), bias)


REFERENCE = Kernel("reference", is_scaled_gemm=False, requirements=Requirements((Format,)), run=_run_reference)
WEIGHT_ONLY = Kernel(
    "weight_only",
    is_scaled_gemm=False,
    requirements=Requirements((Format,), activations=("bf16",)),
    run=_run_weight_only,
)
