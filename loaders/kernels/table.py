"""The one dispatch table: which kernel runs a layer, and why not another."""

from __future__ import annotations

from dataclasses import dataclass

from omni_convert.formats.errors import KernelError
from omni_convert.loaders.kernels.int_mm import INT_MM
from omni_convert.loaders.kernels.kernel import Kernel, LayerTraits
from omni_convert.loaders.kernels.reference import REFERENCE, WEIGHT_ONLY
from omni_convert.loaders.kernels.scaled_mm import SCALED_MM

__all__ = ["KERNELS", "Selection", "select_kernel"]

#: Fastest first: the first that accepts a layer runs it.
KERNELS: tuple[Kernel, ...] = (SCALED_MM, INT_MM, WEIGHT_ONLY, REFERENCE)


@dataclass(frozen=True)
class Selection:
    """A kernel, and what each faster scaled GEMM for the same format lacked."""

    kernel: Kernel
    declined: tuple[str, ...]

    @property
    def reason(self) -> str:
        if self.declined:
            return "; ".join(self.declined)
        return "fastest" if self.kernel.is_scaled_gemm else "no scaled GEMM for this format"


def select_kernel(layer: LayerTraits, kernels: tuple[Kernel, ...] = KERNELS) -> Selection:
    """The fastest kernel that accepts the layer.

    Raises:
        KernelError: none does; the message gives every kernel's reason.
    """
    reasons: dict[Kernel, str] = {}
    for kernel in kernels:
        lacking = kernel.requirements.unmet(layer)
        if lacking is None:
            return Selection(kernel, tuple(reasons[passed] for passed in reasons if _could_have_been(passed, layer)))
        reasons[kernel] = f"{kernel.name} {lacking}"
    found = f"{layer.format.method} {layer.out_features} x {layer.in_features} on {layer.device}"
    raise KernelError(f"no kernel for {found} with {layer.activations} activations: {'; '.join(reasons.values())}")


def _could_have_been(kernel: Kernel, layer: LayerTraits) -> bool:
    return kernel.is_scaled_gemm and isinstance(layer.format, kernel.requirements.formats)
