"""FP8 as storage only: weights lie in memory as E4M3 and are dequantized around the forward, in the dtype they had.

For text encoders and VAEs. No scaled GEMM runs; memory is what is gained. The format is `Fp8`, the weight of a
convolution seen as [out, rest].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.fp8 import Fp8

__all__ = ["Fp8WeightStorage", "apply_fp8_weight_storage"]

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)
PLAIN_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Fp8WeightStorage(nn.Module):
    """Mixed into the class of a layer, whose own forward runs: reading `weight` dequantizes it.

    Buffers: `weight`, float8_e4m3fn of the layer's shape, and `weight_scale`, float32 []. A cast
    (`.to(torch.float16)`) changes the dtype in which the layer computes, never codes and scale.
    """

    plain_class: type[nn.Module]
    compute_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, in the dtype in which the layer computes."""
        codes, scale = self._buffers["weight"], self._buffers["weight_scale"]
        assert codes is not None
        assert scale is not None
        return codes.to(self.compute_dtype) * scale.to(self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self._buffers["weight"].device))  # type: ignore[union-attr]  # there always
        stored = {name: self._buffers.pop(name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, tensor in stored.items():
            assert tensor is not None
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype is tensor.dtype else tensor.to(moved.device)
        self.compute_dtype = probe.dtype
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_instance, (self.plain_class,), self.__dict__


@cache
def _stored_class(plain: type[nn.Module]) -> type[Fp8WeightStorage]:
    return type(f"Fp8Storage{plain.__name__}", (Fp8WeightStorage, plain), {"plain_class": plain})


def _empty_instance(plain: type[nn.Module]) -> Fp8WeightStorage:
    stored = _stored_class(plain)  # type: ignore[arg-type]  # mypy takes Module for unhashable
    return stored.__new__(stored)


def apply_fp8_weight_storage(module: nn.Module) -> nn.Module:
    """Stores the weights of all Linear, Conv2d and Conv3d as E4M3 with one scale each, in place, layer by layer.

    A weight that another module shares (a tied embedding) stays: storing it twice would cost memory.

    Returns:
        the module

    Raises:
        CheckpointError: a weight holds NaN or Inf; layers before it are stored already.
        RecipeError: the module has no such layer.
    """
    owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS) and not isinstance(layer, Fp8WeightStorage)
    }
    chosen = {n: layer for n, layer in layers.items() if _is_stored(layer) and owners[id(layer.weight)] == 1}
    if not chosen:
        raise RecipeError(f"fp8 storage: found no Linear, Conv2d or Conv3d to store in {type(module).__name__}")
    for name, layer in chosen.items():
        _store(name, layer)
    return module


def _is_stored(layer: nn.Module) -> bool:
    weight = layer.weight
    return isinstance(weight, nn.Parameter) and weight.dtype in PLAIN_FLOATS and not weight.is_meta


@torch.no_grad()
def _store(name: str, layer: nn.Module) -> None:
    weight = layer.get_parameter("weight").detach()
    tensors = Fp8().quantize(weight.flatten(1))
    if not bool(torch.isfinite(tensors["weight_scale"])) or bool(torch.isnan(tensors["weight"].float()).any()):
        raise CheckpointError(f"{name}.weight holds NaN or Inf, expected finite weights")
    del layer.weight
    layer.register_buffer("weight", tensors["weight"].view(weight.shape).to(weight.device))
    layer.register_buffer("weight_scale", tensors["weight_scale"].to(weight.device))
    layer.__class__ = _stored_class(type(layer))  # type: ignore[arg-type]  # as above
    assert isinstance(layer, Fp8WeightStorage)
    layer.compute_dtype = weight.dtype
