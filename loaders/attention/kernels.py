"""The kernels that compute attention in FP8, the devices that run each, and why another does not.

FlashAttention-3 on Hopper multiplies the codes of `arithmetic`. SageAttention 2 quantizes by itself: P and V to FP8,
but Q and K to INT8. Both are called as documented and have not been run on a GPU by us.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils import (
    is_flash_attn_3_available,
    is_kernels_available,
    is_sageattention_available,
    is_sageattention_version,
)
from torch import Tensor

from omni_convert.formats.errors import KernelError
from omni_convert.loaders.attention.arithmetic import attend, quantize_per_head

__all__ = ["ATTENTION_KERNELS", "AttentionKernel", "select_attention_kernel"]

#: (query [B, Sq, H, D], key and value [B, Sk, Hkv, D], softmax scale) -> [B, Sq, H, D] in the dtype of the query
RunAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]

FLASH_3_HUB = AttentionBackendName("_flash_3_hub")
FLASH_3_CAPABILITIES = ((9, 0),)
SAGE_VERSION = "2.1.1"  # as diffusers asks for
#: Where `sageattn` has a kernel that keeps P and V in FP8.
SAGE_CAPABILITIES = ((8, 9), (9, 0), (12, 0))


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention in FP8.

    Attributes:
        name: as users ask for it
        unmet: why a device cannot run it, or None
        run: see `RunAttention`
        is_automatic: whether it may be chosen when no kernel is named
        prepare: fetches everything that the first call needs
    """

    name: str
    unmet: Callable[[torch.device], str | None]
    run: RunAttention
    is_automatic: bool = True
    prepare: Callable[[], None] = lambda: None


def select_attention_kernel(name: str | None, device: torch.device) -> AttentionKernel:
    """The kernel of that name, or else the first that runs on the device.

    Raises:
        KernelError: there is none; gives every kernel's reason.
    """
    if name is not None and name not in {kernel.name for kernel in ATTENTION_KERNELS}:
        known = ", ".join(kernel.name for kernel in ATTENTION_KERNELS)
        raise KernelError(f"FP8 attention: found backend '{name}', expected one of {known}")
    candidates = [
        kernel for kernel in ATTENTION_KERNELS if (kernel.is_automatic if name is None else kernel.name == name)
    ]
    reasons = {kernel.name: kernel.unmet(device) for kernel in candidates}
    for kernel in candidates:
        if reasons[kernel.name] is None:
            return kernel
    declined = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    raise KernelError(
        f"FP8 attention: found {device} without a kernel ({declined}); install one, "
        "leave FP8 attention off, or try its arithmetic with backend='reference'"
    )


@torch.library.custom_op("omni_convert::fp8_flash_attention_3", mutates_args=())
def _flash_attention_3(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor, scale: float, hub: bool
) -> Tensor:
    """Our own operator, because diffusers declares for its one that the output has the dtype of the codes."""
    attend_flash_3 = _hub_function() if hub else importlib.import_module("flash_attn_interface").flash_attn_func
    out: Any = attend_flash_3(
        q, k, v, softmax_scale=scale, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale
    )
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too
    return attended.contiguous()


@_flash_attention_3.register_fake
def _(q: Tensor, *_others: Any) -> Tensor:
    return q.new_empty(q.shape, dtype=torch.bfloat16)  # contiguous, like the kernel's


def _run_flash_3(query: Tensor, key: Tensor, value: Tensor, scale: float, hub: bool = False) -> Tensor:
    heads = key.shape[2]
    (q, q_descale), (k, k_descale), (v, v_descale) = (quantize_per_head(x, heads) for x in (query, key, value))
    out: Tensor = _flash_attention_3(q, k, v, q_descale, k_descale, v_descale, scale, hub)
    return out.to(query.dtype)


@torch.library.custom_op("omni_convert::sage_attention", mutates_args=())
def _sage_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """An operator, because the package's functions break graphs. They pick the GPU's kernel and quantize themselves."""
    out: Tensor = dispatch_attention_fn(query, key, value, scale=scale, backend=AttentionBackendName.SAGE)
    return out.contiguous()


@_sage_attention.register_fake
def _(query: Tensor, *_others: Any) -> Tensor:
    return query.new_empty(query.shape)  # contiguous, as above


def _hub_function() -> Any:
    kept = attention_dispatch._HUB_KERNELS_REGISTRY[FLASH_3_HUB]  # noqa: SLF001  # only the function kept there accepts scales
    if kept.kernel_fn is None:  # this is another process than the one that enabled it
        _prepare_hub()
    return kept.kernel_fn


def _prepare_hub() -> None:
    """Downloads the kernel once; diffusers checks who published it."""
    try:
        with attention_backend(FLASH_3_HUB):
            return
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise KernelError(f"FP8 attention: found no flash_3_hub ({reason}), expected it; use another") from error


def _unmet_capability(device: torch.device, expected: tuple[tuple[int, int], ...]) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, found {'an AMD GPU' if device.type == 'cuda' else device.type}"
    found = torch.cuda.get_device_capability(device)
    names = " or ".join("{}.{}".format(*capability) for capability in expected)
    return None if found in expected else "needs compute capability {}, found {}.{}".format(names, *found)


def _flash_3_unmet(device: torch.device) -> str | None:
    if not is_flash_attn_3_available():
        return "needs flash_attn_interface, built from the folder hopper of flash-attention"
    return _unmet_capability(device, FLASH_3_CAPABILITIES)


def _flash_3_hub_unmet(device: torch.device) -> str | None:
    if not is_kernels_available():
        return "needs kernels from PyPI"
    return _unmet_capability(device, FLASH_3_CAPABILITIES)


def _sage_unmet(device: torch.device) -> str | None:
    if not is_sageattention_available() or not is_sageattention_version(">=", SAGE_VERSION):
        return f"needs sageattention>={SAGE_VERSION}"
    return _unmet_capability(device, SAGE_CAPABILITIES)


#: In the order of preference.
ATTENTION_KERNELS = (
    AttentionKernel("flash_3", _flash_3_unmet, _run_flash_3),
    AttentionKernel("sage", _sage_unmet, _sage_attention),
    AttentionKernel(
        "flash_3_hub", _flash_3_hub_unmet, partial(_run_flash_3, hub=True), is_automatic=False, prepare=_prepare_hub
    ),
    AttentionKernel("reference", lambda _device: None, attend, is_automatic=False),
)
