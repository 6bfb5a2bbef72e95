"""Turns the tensors of a layer in a LoRA file into changes of its weight, by the algorithm that their names tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.source.lora_file import LayerGroup
from omni_convert.convert.source.lora_strength import Strength
from omni_convert.formats.views.lora_changes import (
    Addition,
    Change,
    Decomposition,
    Delta,
    Difference,
    Hadamard,
    InputRotation,
    Kronecker,
    LowRank,
    OutputRotation,
)

__all__ = ["LayerChange", "changes_of"]

# What a tensor may be called below its layer; "" where the layer's name is that of the tensor itself.
WEIGHT_LEAVES = ("weight", "")
BIAS_LEAVES = ("bias",)
MODULATION_LEAVES = ("modulation",)


@dataclass(frozen=True)
class LayerChange:
    """A change of one tensor of a layer.

    Attributes:
        roles: roles of the tensors that it is made of
        leaves: what the changed tensor may be called below the layer
    """

    change: Change
    roles: tuple[str, ...]
    leaves: tuple[str, ...]


def changes_of(group: LayerGroup, strength: Strength, scale: float, shape: tuple[int, int] | None) -> list[LayerChange]:
    """The changes of a layer; tensors whose partners are missing, or that do not fit each other, are in none of them.

    Args:
        strength: the file's own
        scale: the user's strength
        shape: of the layer's weight in the model, [out, in]; None if it has none
    """
    changes = [*_weight_changes(group, strength, scale, shape)]
    tensors = group.tensors
    if "up_bias" in tensors:
        # PEFT scales the bias of `up` with all that the pair adds.
        own = strength.of(group, tensors["down"].shape[0]) if "down" in tensors else 1.0
        changes.append(_difference(tensors, "up_bias", scale * own, BIAS_LEAVES))
    if "bias_difference" in tensors:
        changes.append(_difference(tensors, "bias_difference", scale, BIAS_LEAVES))
    if "modulation_difference" in tensors:
        changes.append(_difference(tensors, "modulation_difference", scale, MODULATION_LEAVES))
    return changes


def _difference(tensors: Mapping[str, Tensor], role: str, scale: float, leaves: tuple[str, ...]) -> LayerChange:
    return LayerChange(Addition(Difference(tensors[role]), scale), (role,), leaves)


def _weight_changes(
    group: LayerGroup, strength: Strength, scale: float, shape: tuple[int, int] | None
) -> list[LayerChange]:
    tensors = group.tensors
    changes = []
    if "difference" in tensors and tensors["difference"].dim():
        changes.append(_difference(tensors, "difference", scale, WEIGHT_LEAVES))
    for roles, own, delta in _deltas(group, strength):
        used = (*roles, *(role for role in ("alpha", "reshape") if role in tensors and _is_idle(role, tensors, shape)))
        change: Change = Addition(delta, scale * own)
        if "magnitude" in tensors:
            magnitude = _magnitude(tensors["magnitude"], delta.shape)
            if magnitude is None:
                continue
            used, change = (*used, "magnitude"), Decomposition(delta, own, magnitude, scale)
        changes.append(LayerChange(change, used, WEIGHT_LEAVES))
    if shape is not None and "magnitude" not in tensors:
        changes += _rotations(group, strength.adapter, scale, shape)
    return changes


def _is_idle(role: str, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None) -> bool:
    """Whether a tensor beside the factors has done its work: `reshape_weight` must name the shape that there is."""
    return role != "reshape" or (shape is not None and tuple(tensors[role].tolist()[:2]) == shape)


def _deltas(group: LayerGroup, strength: Strength) -> list[tuple[tuple[str, ...], float, Delta]]:
    """The change that is added to the weight: the roles it is made of, the file's own strength, and the matrix."""
    makers = (_low_rank, _hadamard, _kronecker)
    return [found for make in makers if (found := make(group, strength)) is not None]


def _low_rank(group: LayerGroup, strength: Strength) -> tuple[tuple[str, ...], float, Delta] | None:
    tensors = group.tensors
    if not {"down", "up"} <= tensors.keys():
        return None
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    own = strength.of(group, down.shape[0])
    if mid is not None:
        down = torch.einsum("mn...,nj->mj...", mid.double(), down.double().flatten(1))
    if down.dim() < 2 or up.dim() < 2 or up.flatten(1).shape[1] != down.shape[0]:
        return None
    roles = ("down", "up", *(("mid",) if mid is not None else ()))
    return roles, own, LowRank(down.flatten(1), up.flatten(1))


def _hadamard(group: LayerGroup, strength: Strength) -> tuple[tuple[str, ...], float, Delta] | None:
    tensors = group.tensors
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if not set(roles) <= tensors.keys():
        return None
    cores = tuple(role for role in ("hada_t1", "hada_t2") if role in tensors)
    first, second = (
        _tucker(tensors.get(f"hada_t{n}"), tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in (1, 2)
    )
    if len(cores) == 1 or first.shape != second.shape:
        return None
    return (*roles, *cores), strength.of(group, tensors["hada_w1_b"].shape[0]), Hadamard(first, second)


def _tucker(core: Tensor | None, up: Tensor, down: Tensor) -> LowRank:
    """The product of two factors, or of two and a core [rank, rank, kernel] of a convolution."""
    if core is None:
        return LowRank(down.flatten(1), up)
    return LowRank(torch.einsum("ij...,jr->ir...", core.double(), down.double()).flatten(1), up.T)


def _kronecker(group: LayerGroup, strength: Strength) -> tuple[tuple[str, ...], float, Delta] | None:
    tensors = group.tensors
    first = _kronecker_half(tensors, "lokr_w1", None)
    second = _kronecker_half(tensors, "lokr_w2", tensors.get("lokr_t2"))
    if first is None or second is None:
        return None
    (outer_roles, outer, outer_rank), (inner_roles, inner, inner_rank) = first, second
    rank = inner_rank or outer_rank
    own = strength.of(group, rank) if rank else strength.of_full(group)
    return (*outer_roles, *inner_roles), own, Kronecker(outer, inner)


def _kronecker_half(
    tensors: Mapping[str, Tensor], name: str, core: Tensor | None
) -> tuple[tuple[str, ...], Tensor, int | None] | None:
    """One of the two factors: roles, matrix, and the rank if it is a product itself."""
    if name in tensors:
        return (name,), tensors[name], None
    roles = (f"{name}_a", f"{name}_b")
    if not set(roles) <= tensors.keys():
        return None
    a, b = (tensors[role].double() for role in roles)
    if core is not None:
        return (*roles, "lokr_t2"), torch.einsum("ij...,jr,ip->pr...", core.double(), b, a), b.shape[0]
    return roles, (a @ b.flatten(1)).view(-1, *b.shape[1:]), b.shape[0]


def _magnitude(tensor: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """The trained norms, [out, 1] or [1, in], or None if they are those of another weight."""
    if tensor.numel() == shape[0] and (tensor.dim() == 1 or tensor.shape[0] == shape[0]):
        return tensor.reshape(-1, 1)
    if tensor.numel() == shape[1] and tensor.shape[0] == 1:
        return tensor.reshape(1, -1)
    return None


def _rotations(
    group: LayerGroup, adapter: Mapping[str, Any], scale: float, shape: tuple[int, int]
) -> list[LayerChange]:
    tensors, changes = group.tensors, []
    blocks, packed = tensors.get("rotations"), tensors.get("packed_rotations")
    if blocks is not None and blocks.dim() == 3 and blocks.shape[1] == blocks.shape[2]:
        rescale = tensors.get("rescale")
        limit = float(tensors["alpha"]) * shape[0] if "alpha" in tensors else 0.0
        rotation = OutputRotation(_cayley(blocks, limit), rescale, shape[1], scale)
        roles = ("rotations", *(role for role in ("rescale", "alpha") if role in tensors))
        if rescale is None or rescale.numel() == shape[0]:
            changes.append(LayerChange(rotation, roles, WEIGHT_LEAVES))
    if packed is not None and packed.dim() == 2 and not adapter.get("coft"):
        rotation_of_inputs = _packed_rotation(packed, adapter, scale, shape)
        roles = ("packed_rotations", *(("alpha",) if "alpha" in tensors else ()))
        if rotation_of_inputs is not None:
            changes.append(LayerChange(rotation_of_inputs, roles, WEIGHT_LEAVES))
    return changes


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """Rotations (I + Q) (I - Q)^-1 with Q = B - B^T, float64 [blocks, n, n]; a limit of 0 is none.

    Trainers limit the norm of Q, of all blocks together, to alpha times the rows of the weight.
    """
    turned = blocks.double() - blocks.double().transpose(1, 2)
    norm = float(turned.norm())
    if limit > 0 and norm > limit:
        turned = turned * (limit / norm)
    eye = torch.eye(blocks.shape[1], dtype=torch.float64)
    inverse: Tensor = torch.linalg.inv(eye - turned)
    return (eye + turned) @ inverse


def _packed_rotation(
    packed: Tensor, adapter: Mapping[str, Any], scale: float, shape: tuple[int, int]
) -> InputRotation | None:
    """PEFT's rotations, of which a file holds the upper triangles: [blocks, n (n - 1) / 2]."""
    size = int((1 + (1 + 8 * packed.shape[1]) ** 0.5) / 2)
    if size * (size - 1) // 2 != packed.shape[1] or shape[1] % size:
        return None
    count = shape[1] // size
    if packed.shape[0] not in (1, count):
        return None
    upper = torch.zeros(packed.shape[0], size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    upper[:, rows, columns] = packed.double()
    terms = int(adapter.get("num_cayley_neumann_terms", 5))
    rotations = _neumann(upper, terms) if adapter.get("use_cayley_neumann", True) else _cayley(-upper, 0.0)
    return InputRotation(rotations.expand(count, size, size), shape[0], scale)


def _neumann(upper: Tensor, terms: int) -> Tensor:
    """PEFT's approximation of the rotation by the first terms of its series: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)."""
    turned = upper - upper.transpose(1, 2)
    total = torch.eye(upper.shape[1], dtype=torch.float64) + (2 * turned if terms > 1 else 0)
    if terms > 2:
        power = turned @ turned
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ turned
            total = total + 2 * power
        total = total + power @ turned
    return total
