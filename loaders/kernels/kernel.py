"""A kernel is a way to run a quantized linear layer. Its requirements are data, so it can say why it declines one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from omni_convert.formats.format import Format

__all__ = ["Activations", "Kernel", "LayerTraits", "Requirements", "RunLinear", "rounded_input"]

#: `quantized`: inputs are quantized as serving runtimes do it. `bf16`: only weights are; inputs keep their dtype.
Activations = Literal["quantized", "bf16"]

#: (x [M, in], tensors by suffix, format, bias [out] or None) -> [M, out] in the dtype of x
RunLinear = Callable[[Tensor, Mapping[str, Tensor], Format, Tensor | None], Tensor]


@dataclass(frozen=True)
class LayerTraits:
    """Everything that the choice of a kernel depends on; none of it changes between calls."""

    format: Format
    out_features: int
    in_features: int
    device: torch.device
    activations: Activations = "quantized"


@dataclass(frozen=True)
class Requirements:
    """The layers that a kernel can run.

    Attributes:
        formats: classes of format
        activations: how the inputs may be treated
        devices: device types; None for any
        capability: lowest CUDA compute capability, checked on CUDA devices only; AMD GPUs never have it
        below_capability: first compute capability that no longer has the instructions which the kernel needs
        cuda: lowest version of CUDA that torch is built for, checked on CUDA devices only
        block_size: rows and columns that must share a scale; None for any
        group_multiple: divisor of the number of columns that share a scale
        multiple_of: divisor of in_features and out_features, except on a CPU
        module: a package that has the operators
        has_input_scale: whether the layer must store the scale of its inputs
    """

    formats: tuple[type[Format], ...]
    activations: tuple[Activations, ...] = ("quantized",)
    devices: tuple[str, ...] | None = None
    capability: tuple[int, int] | None = None
    below_capability: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    block_size: tuple[int, int] | None = None
    group_multiple: int = 1
    multiple_of: int = 1
    module: str | None = None
    has_input_scale: bool = False

    def unmet(self, layer: LayerTraits) -> str | None:
        """The reason why a layer cannot run, or None."""
        if not isinstance(layer.format, self.formats):
            names = ", ".join(format_class.__name__ for format_class in self.formats)
            return f"runs {names}, not {type(layer.format).__name__}"
        if layer.activations not in self.activations:
            return f"runs {' or '.join(self.activations)} activations, not {layer.activations}"
        if self.devices is not None and layer.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {layer.device.type}"
        block_size = None if layer.format.encoding is None else layer.format.encoding.block_size
        if self.block_size not in (None, block_size):
            return f"needs blocks of {self.block_size}, found {block_size}"
        group = block_size[1] if block_size else 0
        if group % self.group_multiple:
            return f"needs scales of columns in multiples of {self.group_multiple}, found {group}"
        if self.has_input_scale and not layer.format.is_static:
            return "needs input_scale, the layer stores none"
        if self.module is not None and find_spec(self.module) is None:
            return f"needs {self.module}"
        return None if layer.device.type == "cpu" else self._unmet_on_accelerator(layer)

    def _unmet_on_accelerator(self, layer: LayerTraits) -> str | None:
        if self.capability is not None and layer.device.type == "cuda":
            lacking = self._unmet_on_cuda(self.capability, layer.device)
            if lacking is not None:
                return lacking
        if layer.in_features % self.multiple_of or layer.out_features % self.multiple_of:
            shape = f"{layer.out_features} x {layer.in_features}"
            return f"needs features divisible by {self.multiple_of}, found {shape}"
        return None

    def _unmet_on_cuda(self, capability: tuple[int, int], device: torch.device) -> str | None:
        if torch.version.hip is not None:  # ROCm calls its devices cuda; its float8 types and capabilities differ
            return "needs an NVIDIA GPU"
        found = torch.cuda.get_device_capability(device)
        if found < capability:
            return "needs compute capability {}.{}, found {}.{}".format(*capability, *found)
        if self.below_capability is not None and found >= self.below_capability:
            return "needs compute capability below {}.{}, found {}.{}".format(*self.below_capability, *found)
        version = torch.version.cuda or "0.0"
        if self.cuda is not None and tuple(map(int, version.split(".")[:2])) < self.cuda:
            return "needs CUDA {}.{}, torch is built for {}".format(*self.cuda, version)
        return None


@dataclass(frozen=True)
class Kernel:
    """One way to run a quantized linear layer.

    Attributes:
        name: as reports show it
        is_scaled_gemm: whether codes are multiplied as they are and the scales are applied to the result
        run: see `RunLinear`
    """

    name: str
    is_scaled_gemm: bool
    requirements: Requirements
    run: RunLinear


def rounded_input(x: Tensor, tensors: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """The input [M, in] as the runtime's GEMM sees it: smoothed, quantized and restored, float32."""
    return fmt.round_inputs(fmt.scale_inputs(x.detach(), tensors), tensors)  # rounding has no derivative
