"""The arithmetic of FP8 attention in plain torch: the rotation, the codes of Q, K and V, and their attention.

Tensors:    query [B, Sq, H, D], key and value [B, Sk, Hkv, D], H % Hkv == 0
Arithmetic: Q ≈ q * q_descale, likewise K and V; q is E4M3, descale = amax / 448 of a head, float32 [B, Hkv]
            S = q·kᵀ * q_descale * k_descale * scale;  P = exp(S - rowmax S)
            O = E4M3(256 P)·v * v_descale / 256 / rowsum P, as FlashAttention-3 on Hopper
Rotation:   Q and K times R = diag(±1)·H/√D, H the Walsh-Hadamard matrix: Q·Kᵀ is unchanged, outliers spread out
Limits:     no mask (see `padding`), no causal order, no dropout; rotated heads have a power of two as D
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.float8 import E4M3_MAX, round_to_e4m3
from omni_convert.formats.errors import KernelError

__all__ = ["attend", "quantize_per_head", "rotate_heads", "rotated_scale"]

HADAMARD_SEED = 0
P_SCALE = 256.0
SMALLEST_AMAX = 1e-12


def rotate_heads(x: Tensor) -> Tensor:
    """`[..., D]` times the rotation, divided by √2 if D is an odd power of two (see `rotated_scale`).

    Raises:
        KernelError: D is not a power of two.
    """
    head_dim = x.shape[-1]
    if head_dim & (head_dim - 1):
        raise KernelError(f"FP8 attention: found heads of {head_dim}, expected a power of two; use rotate=False")
    rotated: Tensor = _rotate(x)
    return rotated


@torch.library.custom_op("omni_convert::rotate_heads", mutates_args=())
def _rotate(x: Tensor) -> Tensor:
    """An operator, because a graph has no place for a matrix that is built once and kept."""
    return x @ _rotation(x.shape[-1], x.device, x.dtype)


@_rotate.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def rotated_scale(scale: float, head_dim: int) -> float:
    """The softmax scale that undoes the factor of √2, without which the matrix would not be exact in bfloat16."""
    return scale * 4.0 ** (head_dim.bit_length() // 2) / head_dim


@functools.cache
def _rotation(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # it is cached, and calls outside of that mode use it too
        generator = torch.Generator().manual_seed(HADAMARD_SEED)
        signs = torch.randint(2, (head_dim, 1), generator=generator, device="cpu") * 2 - 1
        matrix = torch.ones(1, 1, device="cpu")
        while len(matrix) < head_dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (signs * matrix * 0.5 ** (head_dim.bit_length() // 2)).to(device, dtype)


def quantize_per_head(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes in the shape of x, `[B, S, H, D]`, and their descale, float32 `[B, heads]`.

    Args:
        heads: number of groups of consecutive heads that share a scale; for grouped queries, the heads of K
    """
    groups = x.float().reshape(*x.shape[:2], heads, -1, x.shape[3])  # [B, S, heads, H / heads, D]
    descale = groups.abs().amax((1, 3, 4)).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    return round_to_e4m3(groups / descale[:, None, :, None, None]).flatten(2, 3), descale


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The arithmetic in float32, all scores at once; a reference for tests and trials, not fast."""
    heads = key.shape[2]
    group = query.shape[2] // heads
    (q, q_descale), (k, k_descale), (v, v_descale) = (quantize_per_head(x, heads) for x in (query, key, value))
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores_scale, v_scale = (x.repeat_interleave(group, 1)[..., None, None] for x in (q_descale * k_descale, v_descale))
    scores = q @ k.transpose(2, 3) * (scores_scale * scale)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = round_to_e4m3(weights * P_SCALE).float() @ v
    return (out * (v_scale / P_SCALE) / weights.sum(-1, keepdim=True)).transpose(1, 2).to(query.dtype)
