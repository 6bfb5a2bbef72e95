"""Reports which kernel runs each layer of a pipeline, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.quantizers.gguf.utils import GGUFLinear
from torch import nn

from omni_convert.formats.errors import KernelError, RecipeError, listed
from omni_convert.loaders.attention.diffusers_backends import is_fp8_backend
from omni_convert.loaders.attention.enable import count_attention_backends
from omni_convert.loaders.layers.fp8_storage import Fp8WeightStorage
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear

__all__ = ["KernelReport", "LayerReport", "kernel_report", "require_scaled_gemm"]

NAMES_SHOWN = 3
COLUMNS = ("layers", "format", "kernel", "bytes", "a weight", "such as", "why")


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: component and layer, such as `transformer.layers.0.attention.to_q`
        is_as_asked: a scaled GEMM runs, or the user asked for bf16 activations, for example by choosing W4A16
        why: the reason why each faster kernel cannot run, or that this is the fastest scaled GEMM
        bytes: size of the tensors that the layer keeps, the bias included
        elements: number of elements of the weight
    """

    name: str
    format: str
    kernel: str
    is_scaled_gemm: bool
    is_as_asked: bool
    why: str
    bytes: int
    elements: int

    @property
    def bytes_per_weight(self) -> float:
        return self.bytes / self.elements


@dataclass(frozen=True)
class KernelReport:
    """All quantized layers of a pipeline.

    When it is printed, layers with the same format, kernel and reason share a line.

    Attributes:
        layers: the layers one by one
        attention: number of attention layers by the diffusers backend that they name; empty if none runs in FP8
    """

    layers: tuple[LayerReport, ...]
    attention: Mapping[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerReport:
        return self.layers[index]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in use."""
        return tuple(dict.fromkeys(layer.kernel for layer in self.layers))

    @property
    def fallbacks(self) -> tuple[LayerReport, ...]:
        """Layers that run no scaled GEMM although the user asked for one."""
        return tuple(layer for layer in self.layers if not layer.is_as_asked)

    def __str__(self) -> str:
        lines = self._layer_lines() if self.layers else ["no quantized layers"]
        if self.attention:
            lines.append("attention: " + ", ".join(f"{count} {backend}" for backend, count in self.attention.items()))
        return "\n".join(lines)

    def _layer_lines(self) -> list[str]:
        rows = [COLUMNS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        scaled = sum(layer.is_scaled_gemm for layer in self.layers)
        total = sum(layer.bytes for layer in self.layers)
        return [*lines, f"{len(self.layers)} layers, {scaled} in scaled GEMMs, {total:,} bytes"]

    def _rows(self) -> list[tuple[str, ...]]:
        alike: dict[tuple[str, str, str], list[LayerReport]] = {}
        for layer in self.layers:
            alike.setdefault((layer.format, layer.kernel, layer.why), []).append(layer)
        return [_row(group) for group in alike.values()]


def _row(alike: list[LayerReport]) -> tuple[str, ...]:
    first = alike[0]
    total = sum(layer.bytes for layer in alike)
    per_weight = total / sum(layer.elements for layer in alike)
    return str(len(alike)), first.format, first.kernel, f"{total:,}", f"{per_weight:.3f}", first.name, first.why


def kernel_report(model: Any) -> KernelReport:
    """Reports every quantized or stored layer of a pipeline (anything with `components`) or of a module.

    Raises:
        RecipeError: the model is neither.
    """
    components = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise RecipeError(f"kernel_report: found {type(model).__name__}, expected a pipeline or a torch module")
    modules = {component: module for component, module in components.items() if isinstance(module, nn.Module)}
    backends = count_attention_backends(modules.values())
    return KernelReport(
        tuple(
            _describe(".".join(filter(None, (component, name))), layer)
            for component, module in modules.items()
            for name, layer in module.named_modules()
            if isinstance(layer, QuantizedLinear | Fp8WeightStorage | GGUFLinear)
        ),
        attention=backends if any(map(is_fp8_backend, backends)) else {},
    )


def _describe(name: str, layer: QuantizedLinear | Fp8WeightStorage | GGUFLinear) -> LayerReport:
    if isinstance(layer, Fp8WeightStorage):
        return _describe_stored(name, layer)
    if isinstance(layer, GGUFLinear):
        return _describe_gguf(name, layer)
    selection = layer.selection
    return LayerReport(
        name=name,
        format=layer.format.label,
        kernel=selection.kernel.name,
        is_scaled_gemm=selection.kernel.is_scaled_gemm,
        is_as_asked=selection.kernel.is_scaled_gemm or layer.activations == "bf16" or layer.format.is_weight_only,
        why=selection.reason,
        bytes=sum(tensor.nbytes for tensor in layer.state_dict().values()),
        elements=layer.out_features * layer.in_features,
    )


def _describe_stored(name: str, layer: Fp8WeightStorage) -> LayerReport:
    """A layer that is only stored in FP8, as asked for, so it is not a fallback."""
    return LayerReport(
        name=name,
        format=layer.stored_format.label,
        kernel="dequantize",
        is_scaled_gemm=False,
        is_as_asked=True,
        why=f"stored only, computes in {layer.compute_dtype}".replace("torch.", ""),
        bytes=sum(tensor.nbytes for tensor in layer.state_dict().values()),
        elements=layer.codes.numel(),
    )


def _describe_gguf(name: str, layer: Any) -> LayerReport:
    """A layer of diffusers' GGUF class, which also holds weights that are not quantized."""
    kind = getattr(layer.weight, "quant_type", None)
    return LayerReport(
        name=name,
        format=f"gguf {kind.name}" if kind is not None else "gguf, not quantized",
        kernel="diffusers",
        is_scaled_gemm=False,
        is_as_asked=kind is None,
        why="dequantized before each use" if kind is not None else "as it is stored",
        bytes=sum(tensor.nbytes for tensor in layer.state_dict().values()),
        elements=layer.out_features * layer.in_features,
    )


def require_scaled_gemm(report: KernelReport) -> None:
    """Refuses a pipeline in which a layer falls back to decoding its weight.

    Raises:
        KernelError: layers decode their weights, which the message lists with reasons; or no layer is quantized.
    """
    if not report.layers:
        raise KernelError(
            "strict: found no quantized layer, expected some; load a quantized checkpoint, ask for quantization, or "
            "leave strict out"
        )
    if not report.fallbacks:
        return
    alike: dict[str, list[str]] = {}
    for layer in report.fallbacks:
        alike.setdefault(f"{layer.format} runs {layer.kernel} ({layer.why})", []).append(layer.name)
    reasons = "; ".join(f"{reason} in {listed(names, NAMES_SHOWN)}" for reason, names in alike.items())
    raise KernelError(
        f"strict: {len(report.fallbacks)} of {len(report)} layers run no scaled GEMM: {reasons}; "
        "use another format or device, or strict=False"
    )
