"""FP8 as storage only: the weights of linears and convolutions that are dequantized before they are used.

Tensors:    NAME.weight        F8_E4M3 [out, in] or [out, in, (depth,) height, width], the shape of the layer's weight
            NAME.weight_scale  F32 []    amax / 448
Arithmetic: W ≈ E4M3(code) * weight_scale, as in `fp8`; activations stay as they are, and the layer computes in their
            dtype. Nothing is shared between layers: each is dequantized by itself.
Consumers:  `omni_convert.loaders`. vLLM-Omni does the same to encoders and VAEs in memory, and reads no such file.
Limits:     none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Calibration
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.fp8 import Fp8, has_float_scale

__all__ = ["Fp8Storage"]


@dataclass(frozen=True)
class Fp8Storage(Fp8):
    """FP8 with one scale per weight, for weights of any number of dimensions.

    Other code sees the weight as the matrix [out, rest]; only the layout shows its other dimensions.

    Attributes:
        kernel: dimensions of a convolution's weight after the first; () for a linear
    """

    kernel: tuple[int, ...] = ()

    method = "fp8_storage"
    is_storage = True
    activation_schemes = ("none",)
    calibration = Calibration.UNUSED
    options = ()
    config_fields = ()

    @classmethod
    def build(cls, options: FormatOptions) -> Fp8Storage:  # noqa: ARG003  # it has none
        return cls()

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> Fp8Storage | None:
        return cls().for_weight(tensors["weight"].shape) if has_float_scale(tensors) else None

    @property
    def activation_scheme(self) -> str:
        return "none"

    def for_weight(self, shape: tuple[int, ...]) -> Self:
        """The format of a weight of this shape, of two dimensions or more."""
        return replace(self, kernel=shape[1:] if len(shape) > 2 else ())

    @property
    def label(self) -> str:
        return self.method

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        assert not self.kernel or math.prod(self.kernel) == in_features, (self.kernel, in_features)
        layout = super().layout(out_features, in_features)
        return layout | {"weight": replace(layout["weight"], shape=self.weight_shape(out_features, in_features))}

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        return (out_features, *(self.kernel or (in_features,)))

    def quantize_rows(self, rows: Tensor, fitted: object) -> dict[str, Tensor]:
        codes = super().quantize_rows(rows.flatten(1), fitted)["weight"]  # type: ignore[arg-type]  # what `fit` made
        return {"weight": codes.view(rows.shape)}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return super().dequantize({**tensors, "weight": tensors["weight"].flatten(1)})

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return inputs.float()

    def encode_elements(self, elements: Tensor) -> Tensor:
        return elements.to(torch.float8_e4m3fn).view(len(elements), *(self.kernel or elements.shape[1:]))
