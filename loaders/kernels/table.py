"""The one dispatch table: which kernel runs a layer, and why not another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omni_convert.formats.errors import KernelError
from omni_convert.loaders.kernels.decode_mm import CPU_DECODE_MM, DECODE_MM, DECODE_WEIGHT_MM
from omni_convert.loaders.kernels.int_mm import INT_MM
from omni_convert.loaders.kernels.kernel import Kernel, LayerTraits
from omni_convert.loaders.kernels.mx_scaled_mm import MXFP8_SCALED_MM, NVFP4_SCALED_MM
from omni_convert.loaders.kernels.npu import NPU_MXFP4, NPU_MXFP4_DUALSCALE, NPU_MXFP8
from omni_convert.loaders.kernels.reference import REFERENCE, WEIGHT_ONLY
from omni_convert.loaders.kernels.scaled_mm import SCALED_MM

__all__ = ["KERNELS", "Selection", "select_kernel"]

#: Fastest first: the first that accepts a layer runs it.
KERNELS: tuple[Kernel, ...] = (
    CPU_DECODE_MM,
    SCALED_MM,
    MXFP8_SCALED_MM,
    NVFP4_SCALED_MM,
    INT_MM,
    NPU_MXFP8,
    NPU_MXFP4,
    NPU_MXFP4_DUALSCALE,
    DECODE_MM,
    DECODE_WEIGHT_MM,
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
        return "fastest" if self.kernel.is_scaled_gemm else "no scaled GEMM for this format"


def select_kernel(
    layer: LayerTraits, kernels: tuple[Kernel, ...] = KERNELS, prefer_scaled_gemm: bool = False
) -> Selection:
    """The fastest kernel that accepts the layer.

    Args:
        layer: what is to run
        kernels: fastest first
        prefer_scaled_gemm: whether a scaled GEMM comes before a faster kernel that decodes

    Raises:
        KernelError: none does; the message gives every kernel's reason.
    """
    if prefer_scaled_gemm:
        kernels = tuple(sorted(kernels, key=lambda kernel: not kernel.is_scaled_gemm))
    reasons = {kernel: kernel.requirements.unmet(layer) for kernel in kernels}
    chosen = next((kernel for kernel, lacking in reasons.items() if lacking is None), None)
    if chosen is None:
        found = f"{layer.format.method} {layer.out_features} x {layer.in_features} on {layer.device}"
        declined = "; ".join(f"{kernel.name} {lacking}" for kernel, lacking in reasons.items())
        raise KernelError(f"no kernel for {found} with {layer.activations} activations: {declined}")
    return Selection(chosen, () if chosen.is_scaled_gemm else _declined(layer, reasons))


def _declined(layer: LayerTraits, reasons: Mapping[Kernel, str | None]) -> tuple[str, ...]:
    return tuple(
        f"{kernel.name} {lacking or 'is slower here'}"
        for kernel, lacking in reasons.items()
        if kernel.is_scaled_gemm and isinstance(layer.format, kernel.requirements.formats)
    )
