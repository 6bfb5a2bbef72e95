"""A linear layer that holds the tensors of a checkpoint, packed, and runs a chosen kernel on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from omni_convert.formats.errors import CheckpointError, KernelError, RecipeError
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.options import FormatChoices, FormatOptions, check_group_size
from omni_convert.formats.rows import InputStatistics
from omni_convert.formats.table import FORMATS, RUNNABLE, build_format
from omni_convert.loaders.kernels.kernel import Activations, LayerTraits
from omni_convert.loaders.kernels.table import Selection, select_kernel
from omni_convert.loaders.memory.layout import as_loaded, disk_tensors, memory_tensors, weight_shape
from omni_convert.loaders.memory.pickling import module_state, restore_buffers

__all__ = ["QuantizedLinear", "quantize_linear"]

FLAGS = tuple(option.name for option in fields(FormatOptions) if isinstance(option.default, bool))
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with W quantized.

    It is no `nn.Linear`: diffusers' layerwise casting would cast the scales of one to FP8, where most become zero.
    The tensors are buffers under their names on disk (`weight`, `weight_scale`, ...), so that a model's `dtype` stays
    that of its unquantized parameters. A cast (`.to(torch.float16)`) changes the bias, never codes and scales. Buffers
    have their layout on disk. Weights in containers are the exception: setting one packs it, see
    `loaders/memory/layout.py`.

    The kernel is chosen once for each device that the layer moves to, not per call. An unpickled layer chooses again,
    since it may be on another machine.
    """

    def __init__(
        self,
        fmt: Format,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        activations: Activations = "quantized",
        in_features: int | None = None,
    ) -> None:
        """Holds the tensors of a layer.

        Args:
            fmt: the meaning of the tensors
            tensors: by suffix (`weight`, `weight_scale`, ...), as on disk; may be on the meta device, to be filled in
                later, by setting the attributes
            bias: [out]
            activations: see `Activations`
            in_features: needed if `weight` is packed, so that its width is another
        """
        super().__init__()
        self.format = fmt
        self.tensor_names = tuple(tensors)
        self.out_features, stored_columns = weight_shape(tensors)
        self.in_features = stored_columns if in_features is None else in_features
        for suffix, tensor in memory_tensors(fmt, tensors).items():
            self.register_buffer(suffix, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._activations = activations
        self._prefers_scaled_gemm = False
        self._selections: dict[torch.device, Selection] = {}
        self.select_kernel()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        fmt: QuantizingFormat,
        inputs: InputStatistics | None = None,
        activations: Activations = "quantized",
    ) -> Self:
        """Quantizes one layer.

        Raises:
            RecipeError: the format cannot hold a weight of this shape.
        """
        fmt = as_loaded(fmt).for_weight(tuple(linear.weight.shape))
        problem = fmt.unsupported(linear.out_features, linear.in_features)
        if problem is not None:
            raise RecipeError(problem)
        tensors = fmt.quantize(linear.weight.detach(), inputs)
        tensors = {suffix: tensor.to(linear.weight.device) for suffix, tensor in tensors.items()}
        return cls(fmt, tensors, linear.bias, activations, linear.in_features)

    @property
    def device(self) -> torch.device:
        return self.get_buffer(self.tensor_names[0]).device

    @property
    def activations(self) -> Activations:
        return self._activations

    @activations.setter
    def activations(self, activations: Activations) -> None:
        self._activations = activations
        self.select_kernel()

    @property
    def prefers_scaled_gemm(self) -> bool:
        """Whether a scaled GEMM runs where there is one, even if decoding is faster."""
        return self._prefers_scaled_gemm

    @prefers_scaled_gemm.setter
    def prefers_scaled_gemm(self, is_preferred: bool) -> None:
        self._prefers_scaled_gemm = is_preferred
        self.select_kernel()

    @property
    def selection(self) -> Selection:
        """The kernel that runs where the tensors are, or ran last if they come only to run, and why."""
        ran = [device for device in self._selections if device.type != "meta"]
        return self._selection_on(ran[-1] if ran and self.device.type == "meta" else self.device)

    def select_kernel(self) -> None:
        """Chooses the kernel again, for the device where the tensors are.

        Raises:
            KernelError: no kernel runs this layer there.
        """
        self._selections = {}
        if self.device.type != "meta":
            self._selection_on(self.device)

    def _selection_on(self, device: torch.device) -> Selection:
        if device not in self._selections:
            traits = LayerTraits(self.format, self.out_features, self.in_features, device, self._activations)
            self._selections[device] = select_kernel(traits, prefer_scaled_gemm=self._prefers_scaled_gemm)
        return self._selections[device]

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out], in the dtype of the input."""
        if x.dtype not in INPUT_DTYPES:
            raise KernelError(f"{self}: found an input of {x.dtype}, expected bfloat16, float16 or float32")
        tensors = {suffix: getattr(self, suffix) for suffix in self.tensor_names}
        rows = x.reshape(-1, self.in_features)
        # The kernel for the input's device: offloading hooks move buffers one by one, without a notice.
        out = self._selection_on(x.device).kernel.run(rows, tensors, self.format, self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """The weight that the tensors stand for, float32 [out, in]."""
        return self.format.dequantize(self.disk_tensors())

    def disk_tensors(self) -> dict[str, Tensor]:
        """The format's tensors by suffix, as they are on disk."""
        tensors = {suffix: self.get_buffer(suffix) for suffix in self.tensor_names}
        return disk_tensors(self.format, tensors, self.in_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor):  # diffusers and transformers load tensors by setting buffers
            value = memory_tensors(self.format, {name: value})[name]
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_cast = tensor is not self.bias and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if is_cast else moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.device.type != "meta":
            self._selection_on(self.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**module_state(self), "_selections": {}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(restore_buffers(state))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.select_kernel()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


def quantize_linear(
    linear: nn.Linear,
    method: str | QuantizingFormat,
    activations: Activations = "quantized",
    **options: Any,
) -> QuantizedLinear:
    """Quantizes one linear layer, for experiments and benchmarks.

    Args:
        linear: the layer to quantize; it is not changed
        method: a method's name, or a format
        activations: see `Activations`
        options: of `FormatOptions`, as `weight_block_size=(128, 128)`

    Raises:
        RecipeError: no linear layer of floats; an unknown method or option, or one that needs calibration; or a shape
            that the format cannot hold.
        CheckpointError: the weight or the bias holds NaN or Inf.
    """
    _check_linear(linear)
    if activations not in get_args(Activations):
        raise RecipeError(
            f"quantize_linear: found activations {activations!r}, expected {' or '.join(get_args(Activations))}"
        )
    fmt = method if isinstance(method, QuantizingFormat) else _format(method, options)
    return QuantizedLinear.from_linear(linear, fmt, activations=activations)


def _format(method: str, options: Mapping[str, Any]) -> QuantizingFormat:
    if method not in RUNNABLE or FORMATS[method].is_storage:  # which is no linear that is run quantized
        raise RecipeError(f"quantize_linear: found method '{method}', expected one of {', '.join(RUNNABLE)}")
    _check_options(options)
    if options.get("static"):
        raise RecipeError("quantize_linear: static activations need calibration, convert the model instead")
    return build_format(method, **options)


def _check_options(options: Mapping[str, Any]) -> None:
    known = [option.name for option in fields(FormatOptions)]
    if unknown := sorted(options.keys() - {*known}):
        raise RecipeError(f"quantize_linear: found option '{unknown[0]}', expected one of {', '.join(known)}")
    for name in FLAGS:
        if not isinstance(options.get(name, False), bool):
            raise RecipeError(f"quantize_linear: found {name} {options[name]!r:.40}, expected True or False")
    for choice in fields(FormatChoices):
        value, choices = options.get(choice.name), choice.metadata["choices"]
        if value is not None and choices and value not in choices:
            expected = f"expected one of {', '.join(choices)}"
            raise RecipeError(f"quantize_linear: found {choice.name} {value!r:.40}, {expected}")
    size = options.get("weight_block_size")
    if size is not None and not _is_block_size(size):
        raise RecipeError(f"quantize_linear: found weight_block_size {size!r:.40}, expected two sizes as (128, 128)")
    if size is not None and options.get("per_channel"):
        raise RecipeError(f"quantize_linear: found per_channel with weight_block_size {size}, expected one of the two")
    check_group_size(options.get("group_size"), "quantize_linear: group_size")


def _is_block_size(size: object) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)


def _check_linear(linear: object) -> None:
    if not isinstance(linear, nn.Linear):
        raise RecipeError(f"quantize_linear: found {type(linear).__name__}, expected torch.nn.Linear")
    weight = linear.weight
    if weight.dtype not in INPUT_DTYPES or not weight.numel():
        raise RecipeError(
            f"quantize_linear: found a weight of {weight.dtype} {list(weight.shape)}, expected bfloat16, float16 or "
            "float32, and at least one row and column"
        )
    for name, tensor in linear.named_parameters(recurse=False):
        if not tensor.is_meta and not all(math.isfinite(bound) for bound in torch.aminmax(tensor.detach())):
            raise CheckpointError(f"quantize_linear: found NaN or Inf in the {name}, expected finite numbers")
