"""The one dispatch table: which kernel runs a layer, and why not another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from omni_convert.formats.errors import KernelError
from omni_convert.loaders.kernels.block_scaled_mm import BLOCK_SCALED_MM
from omni_convert.loaders.kernels.decode_mm import CPU_DECODE_MM, DECODE_MM, DECODE_WEIGHT_MM
from omni_convert.loaders.kernels.fused_decode_mm import TRITON_DECODE_MM, TRITON_DECODE_WEIGHT_MM
from omni_convert.loaders.kernels.int_mm import INT_MM
from omni_convert.loaders.kernels.kernel import Kernel, LayerTraits
from omni_convert.loaders.kernels.mx_scaled_mm import MXFP8_SCALED_MM, NVFP4_SCALED_MM
from omni_convert.loaders.kernels.npu import NPU_MXFP4, NPU_MXFP4_DUALSCALE, NPU_MXFP8
from omni_convert.loaders.kernels.reference import REFERENCE, WEIGHT_ONLY
from omni_convert.loaders.kernels.scaled_mm import SCALED_MM

__all__ = ["KERNELS", "OVERRIDE", "Selection", "select_kernel"]

#: Environment variable that names the only kernel to use, for debugging; read when a layer chooses its kernel.
OVERRIDE = "OMNI_CONVERT_KERNEL"

#: Fastest first: the first that accepts a layer runs it.
KERNELS: tuple[Kernel, ...] = (
    CPU_DECODE_MM,
    SCALED_MM,
    BLOCK_SCALED_MM,
    MXFP8_SCALED_MM,
    NVFP4_SCALED_MM,
    INT_MM,
    NPU_MXFP8,
    NPU_MXFP4,
    NPU_MXFP4_DUALSCALE,
    DECODE_MM,
    DECODE_WEIGHT_MM,
    TRITON_DECODE_MM,  # after plain torch until they have run on hardware; `OVERRIDE` chooses them
    TRITON_DECODE_WEIGHT_MM,
    REFERENCE,
    WEIGHT_ONLY,
)


@dataclass(frozen=True)
class Selection:
    """A kernel, and for each other scaled GEMM of the format why it does not run."""

    kernel: Kernel
    declined: tuple[str, ...]

    @property
    def reason(self) -> str:
        if self.declined:
            return "; ".join(self.declined)
        return "the fastest scaled GEMM" if self.kernel.is_scaled_gemm else "no scaled GEMM for this format"


def select_kernel(
    layer: LayerTraits, kernels: tuple[Kernel, ...] = KERNELS, prefer_scaled_gemm: bool = False
) -> Selection:
    """The fastest kernel that accepts the layer.

    Args:
        layer: what is to run
        kernels: fastest first
        prefer_scaled_gemm: whether a scaled GEMM comes before a faster kernel that decodes

    Raises:
        KernelError: none does, and the message gives every kernel's reason; or the one that `OVERRIDE` names is unknown
            or cannot run the layer.
    """
    forced = os.environ.get(OVERRIDE)
    if forced:
        return _forced(forced, layer, kernels)
    if prefer_scaled_gemm:
        kernels = tuple(sorted(kernels, key=lambda kernel: not kernel.is_scaled_gemm))
    reasons = {kernel: kernel.requirements.unmet(layer) for kernel in kernels}
    chosen = next((kernel for kernel, lacking in reasons.items() if lacking is None), None)
    if chosen is None:
        declined = "; ".join(f"{kernel.name} {lacking}" for kernel, lacking in reasons.items())
        raise KernelError(f"no kernel for {_describe(layer)}: {declined}")
    return Selection(chosen, () if chosen.is_scaled_gemm else _declined(layer, reasons))


def _forced(name: str, layer: LayerTraits, kernels: tuple[Kernel, ...]) -> Selection:
    kernel = next((kernel for kernel in kernels if kernel.name == name), None)
    if kernel is None:
        known = ", ".join(kernel.name for kernel in kernels)
        raise KernelError(f"{OVERRIDE}: found '{name}', expected one of {known}")
    lacking = kernel.requirements.unmet(layer)
    if lacking is not None:
        raise KernelError(f"{OVERRIDE}: {name} cannot run {_describe(layer)}: it {lacking}; unset {OVERRIDE}")
    return Selection(kernel, (f"{OVERRIDE} says so",))


def _describe(layer: LayerTraits) -> str:
    shape = f"{layer.out_features} x {layer.in_features}"
    return f"{layer.format.label} {shape} on {layer.device} with {layer.activations} activations"


def _declined(layer: LayerTraits, reasons: Mapping[Kernel, str | None]) -> tuple[str, ...]:
    return tuple(
        f"{kernel.name} {lacking or 'is slower here'}"
        for kernel, lacking in reasons.items()
        if kernel.is_scaled_gemm and isinstance(layer.format, kernel.requirements.formats)
    )
