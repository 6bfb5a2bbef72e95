"""Attention under a mask that hides padding: each kernel runs without a mask on the tokens that are left.

Such a mask says the same to every query, except that padded queries may see nothing. The hidden keys can then be left
out, which also keeps them out of the scales of K and V. Masks that show different keys to different queries, such as
causal ones, are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_convert.formats.errors import KernelError
from omni_convert.loaders.attention.kernels import ATTENTION_KERNELS

__all__ = ["attend_without_padding"]

REMEDY = "skip_layers leaves layers as they are, disable_fp8_attention all"


@torch.library.custom_op("omni_convert::attend_without_padding", mutates_args=())
def attend_without_padding(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, name: str) -> Tensor:
    """Runs a kernel on the tokens that a mask leaves. This is an operator because their number depends on data.

    Args:
        query: [B, Sq, H, D]
        key: [B, Sk, Hkv, D]
        value: [B, Sk, Hkv, D]
        mask: bool, true for keys that a query sees; [B, Sk], or broadcastable to [B, 1, Sq, Sk]
        scale: factor of the scores
        name: the kernel's

    Returns:
        [B, Sq, H, D], zero for queries that see no key

    Raises:
        KernelError: the mask hides more than padding.
    """
    (kernel,) = (kernel for kernel in ATTENTION_KERNELS if kernel.name == name)
    queries, keys = _seen_tokens(mask, *query.shape[:2])
    out = query.new_zeros(query.shape)
    for item, (sees, is_seen) in enumerate(zip(queries, keys, strict=True)):
        if is_seen.any():
            k, v = key[item, is_seen], value[item, is_seen]
            out[item, sees] = kernel.run(query[item, sees][None], k[None], v[None], scale)[0]
    return out


@attend_without_padding.register_fake
def _(query: Tensor, *_others: object) -> Tensor:
    return query.new_empty(query.shape)


def _seen_tokens(mask: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The queries that see any key, bool [B, Sq], and the keys that these see, bool [B, Sk]."""
    if mask.ndim == 2:
        mask = mask[:, None, None]  # [B, 1, 1, Sk], as diffusers reads it
    if mask.dtype is not torch.bool or mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1:
        found = f"{mask.dtype} {list(mask.shape)}".removeprefix("torch.")
        raise KernelError(
            f"FP8 attention: found an attention mask of {found}, expected bool [{batch}, 1, queries, keys]; {REMEDY}"
        )
    shown = mask[:, 0].expand(batch, -1, -1)  # [B, Sq or 1, Sk]
    queries, keys = shown.any(-1), shown.any(-2)
    if bool((shown.sum((1, 2)) != queries.sum(1) * keys.sum(1)).any()):
        raise KernelError(
            "FP8 attention: found an attention mask that shows different keys to different queries, expected one that "
            f"hides padding; {REMEDY}"
        )
    return queries.expand(batch, length), keys
