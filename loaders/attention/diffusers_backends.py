"""Registers every FP8 attention kernel as backends of diffusers: `fp8_flash_3`, `fp8_flash_3_rotated`, and so on.

Models ask diffusers' registry for the backend that each layer names, so no part of a model is replaced, and
`model.set_attention_backend("fp8_flash_3_rotated")` works as for any other backend.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from omni_convert.formats.errors import KernelError
from omni_convert.loaders.attention.arithmetic import rotate_heads, rotated_scale
from omni_convert.loaders.attention.kernels import ATTENTION_KERNELS, AttentionKernel
from omni_convert.loaders.attention.padding import attend_without_padding

__all__ = ["backend_of", "is_fp8_backend", "register"]

PREFIX = "fp8_"


def backend_of(kernel: AttentionKernel, rotate: bool) -> AttentionBackendName:
    """The registered backend that runs a kernel."""
    return AttentionBackendName(_value(kernel, rotate))


def is_fp8_backend(backend: AttentionBackendName | str | None) -> bool:
    """Whether a layer that names this backend runs in FP8."""
    return backend is not None and AttentionBackendName(backend).value.startswith(PREFIX)


def register() -> None:
    """Makes the backends known to diffusers. A second call does nothing."""
    for kernel in ATTENTION_KERNELS:
        for rotate in (False, True):
            if _value(kernel, rotate) not in AttentionBackendName.__members__.values():
                _AttentionBackendRegistry.register(_new_member(_value(kernel, rotate)))(_attention(kernel, rotate))


def _value(kernel: AttentionKernel, rotate: bool) -> str:
    return f"{PREFIX}{kernel.name}{'_rotated' if rotate else ''}"


def _new_member(value: str) -> AttentionBackendName:
    """Adds a member to the enum of backend names; before Python 3.13 there is no public way to do it."""
    member: Any = str.__new__(AttentionBackendName, value)
    member._name_, member._value_ = value.upper(), value
    enum: Any = AttentionBackendName
    enum._member_names_.append(member._name_)
    enum._member_map_[member._name_] = enum._value2member_map_[value] = member
    return AttentionBackendName(value)


def _attention(kernel: AttentionKernel, rotate: bool) -> Any:
    """A function with the parameters that the registry passes on; heads are the last dimension but one."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG001  # diffusers passes it on; every kernel accepts grouped queries
        _parallel_config: Any = None,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            _refuse_unless_runnable(kernel, query.device)
        _refuse_unless_plain(is_causal, dropout_p, _parallel_config is not None)
        head_dim = query.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        if rotate:
            query, key, scale = rotate_heads(query), rotate_heads(key), rotated_scale(scale, head_dim)
        if attn_mask is None:
            return kernel.run(query, key, value, scale)
        attended: Tensor = attend_without_padding(query, key, value, attn_mask, scale, kernel.name)
        return attended

    return attention


def _refuse_unless_runnable(kernel: AttentionKernel, device: torch.device) -> None:
    """Checks the device again: the backend may be named directly, or the model moved or unpickled since."""
    reason = kernel.unmet(device)
    if reason is not None:
        raise KernelError(f"FP8 attention: found {device} for {kernel.name}, which {reason}; choose another backend")


def _refuse_unless_plain(is_causal: bool, dropout_p: float, is_parallel: bool) -> None:
    found = {"causal order": is_causal, "dropout": dropout_p > 0, "context parallelism": is_parallel}
    for what, is_found in found.items():
        if is_found:
            raise KernelError(
                f"FP8 attention: found {what}, expected none; skip_layers leaves layers as they are, "
                "disable_fp8_attention all"
            )
