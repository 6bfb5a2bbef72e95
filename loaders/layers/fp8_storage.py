"""FP8 as storage only: weights lie in memory as E4M3 and are dequantized around the forward, in the dtype they had.

It saves memory in text encoders and VAEs; no scaled GEMM runs. The format is `Fp8Storage`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.schemes.fp8_storage import Fp8Storage

__all__ = [
    "STORED_LAYERS",
    "Fp8WeightStorage",
    "apply_fp8_weight_storage",
    "install_stored",
    "restore_weight",
    "storage_layers",
    "store_weight",
]

STORED_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)
PLAIN_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Fp8WeightStorage(nn.Module):
    """Mixed into the class of a layer, whose own forward runs: reading `weight` dequantizes it.

    The layer stays an instance of its class, because models look for theirs (Wan's VAE counts its convolutions to
    cache frames), ask for the dtype of a weight (T5), and subclass convolutions with a forward of their own.

    Buffers: `weight`, float8_e4m3fn of the layer's shape, and `weight_scale`, float32 []. A cast
    (`.to(torch.float16)`) changes the dtype in which the layer computes, never codes and scale. accelerate's offload
    casts a tensor to the dtype of what it replaces, here to that of the dequantized weight: codes are E4M3 numbers in
    any of these dtypes, so the layer computes the same, and its tensors on the CPU stay as they are.
    """

    plain_class: type[nn.Module]
    compute_dtype: torch.dtype
    weight_scale: Tensor

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the dtype in which the layer computes."""
        return self.codes.to(self.compute_dtype) * self.weight_scale.to(self.compute_dtype)

    @property
    def codes(self) -> Tensor:
        """The buffer `weight`."""
        codes = self._buffers["weight"]
        assert codes is not None
        return codes

    @property
    def stored_format(self) -> Fp8Storage:
        return Fp8Storage().for_weight(tuple(self.codes.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = self.codes.device
        cast_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        stored = {name: self._buffers.pop(name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, tensor in stored.items():
            assert tensor is not None
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype is tensor.dtype else tensor.to(moved.device)
        self.compute_dtype = cast_dtype
        return self

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _empty_instance, (self.plain_class,), self.__dict__


@cache
def _stored_class(plain: type[nn.Module]) -> type[Fp8WeightStorage]:
    return type(f"Fp8Storage{plain.__name__}", (Fp8WeightStorage, plain), {"plain_class": plain})


def _empty_instance(plain: type[nn.Module]) -> Fp8WeightStorage:
    stored = _stored_class(plain)  # type: ignore[arg-type]  # mypy takes a class for unhashable
    return stored.__new__(stored)


def apply_fp8_weight_storage(module: nn.Module) -> nn.Module:
    """Stores the weights of all Linear, Conv2d and Conv3d as E4M3 with one scale each, in place, layer by layer.

    A weight that another module shares (a tied embedding) stays: storing it twice would cost memory. To load a model
    so without ever holding it whole, use `load_pipeline(..., quantization={"vae": "fp8_storage"})`.

    Returns:
        the module

    Raises:
        CheckpointError: a weight holds NaN or Inf; layers before it are stored already.
        RecipeError: the module has no such layer.
    """
    names = [name for name, layer in storage_layers(module).items() if not layer.get_parameter("weight").is_meta]
    if not names:
        raise RecipeError(
            f"fp8_storage: found no Linear, Conv2d or Conv3d to store in {type(module).__name__}, expected some"
        )
    for name in names:
        layer = module.get_submodule(name)
        store_weight(layer, layer.get_parameter("weight").detach(), f"{name}.weight")
    return module


def storage_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that can be stored, by name; weights may be on the meta device."""
    owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, STORED_LAYERS)
        and not isinstance(layer, Fp8WeightStorage)
        and isinstance(layer.weight, nn.Parameter)
        and layer.weight.dtype in PLAIN_FLOATS
        and owners[id(layer.weight)] == 1
    }


@torch.no_grad()
def store_weight(layer: nn.Module, weight: Tensor, where: str) -> Fp8WeightStorage:
    """Makes a layer a stored one, in place, from its weight, on the weight's device.

    Args:
        layer: its own weight may be on the meta device; its dtype is that in which the layer will compute
        weight: [out, ...], any float dtype
        where: what to name in errors

    Raises:
        CheckpointError: the weight holds NaN or Inf.
    """
    tensors = Fp8Storage().quantize(weight.flatten(1))
    scale = tensors["weight_scale"].to(weight.device)
    if not bool(torch.isfinite(scale)):
        raise CheckpointError(f"{where} holds NaN or Inf, expected finite weights")
    return install_stored(layer, {"weight": tensors["weight"].view(weight.shape), "weight_scale": scale})


def install_stored(layer: nn.Module, tensors: dict[str, Tensor]) -> Fp8WeightStorage:
    """Makes a layer a stored one, in place; the tensors may be on the meta device, to be filled in later."""
    dtype = layer.get_parameter("weight").dtype
    del layer.weight
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)  # torch has no keyword
    layer.__class__ = _stored_class(type(layer))  # type: ignore[arg-type]  # as above
    stored = cast("Fp8WeightStorage", layer)
    stored.compute_dtype = dtype
    return stored


def restore_weight(layer: Fp8WeightStorage, dtype: torch.dtype) -> None:
    """Makes a stored layer what it was, in place."""
    weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    del layer._buffers["weight"], layer._buffers["weight_scale"]  # noqa: SLF001  # `del layer.weight` asks the property
    layer.__dict__.pop("compute_dtype")
    layer.__class__ = layer.plain_class  # type: ignore[assignment]  # undoes what `install_stored` did
    layer.register_parameter("weight", weight)
