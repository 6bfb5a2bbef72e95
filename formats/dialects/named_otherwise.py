"""Codes that no dialect claims, and scales beside them that are named after the whole tensor.

NAME                            scale                                      from
mlp.experts.gate_up_proj        NAME_scale_inv, NAME_weight_scale, ...     transformers, compressed-tensors, ModelOpt
attn.in_proj_weight             attn.in_proj_scale_weight                  ComfyUI's scaled FP8
down.0.conv.weight              down.0.conv.weight_scale                   any tool; more than two dimensions

In each of them the scale multiplies the codes. Codes of another kind with such a scale are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch

from omni_convert.formats.containers.names import CODES, LOW_BIT, WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import Found, LayerError, StoredLayer
from omni_convert.formats.dialects.detection import read_signature, stored_layer, unknown_format

__all__ = ["layers_named_otherwise"]

# Endings by which the name of a scale differs from that of its codes, after `weight` is cut off.
SCALES = (
    "_scale_inv", "_scale", "_scales", "_weight_scale_inv", "_weight_scale", "_scale_weight", ".weight_scale_inv",
    ".weight_scale", ".scale_weight", ".scale",
)  # fmt: skip
# The same for tensors that change inputs alone.
INPUTS = ("_input_scale", "_activation_scale", "_scale_input", ".input_scale", ".activation_scale", ".scale_input")
# Ends of the names of codes that their scales do not have.
CODE_ENDINGS = ("weight", "_blocks", "_packed", "_qdata")


def layers_named_otherwise(found: Found, used: Collection[str]) -> Iterator[StoredLayer | LayerError]:
    """Every layer of this kind; in place of one that cannot be read, the error that says why.

    Args:
        used: names of the tensors that belong to layers of the dialect
    """
    for name, spec in found.checkpoint.items():
        is_code = spec.dtype in LOW_BIT and len(spec.shape) >= 2 and name not in used
        if is_code and (len(spec.shape) > 2 or name.rpartition(".")[2] not in CODES):
            scale = next(_beside(found, name, SCALES), None)
            if scale is not None and scale.name not in used:
                yield _layer(found, spec, scale)


def _beside(found: Found, name: str, endings: Collection[str]) -> Iterator[TensorSpec]:
    """Tensors that are called as the codes are, with one of these endings."""
    bases = [name, *(name.removesuffix(end) for end in CODE_ENDINGS if name.endswith(end))]
    names = [base + end for base in bases for end in endings]
    # `conv.weight` and `in_proj_weight` leave `conv.` and `in_proj_`.
    names += [base + end[1:] for base in bases[1:] for end in endings if base.endswith((".", "_"))]
    return (found.checkpoint[each] for each in names if each in found.checkpoint)


def _layer(found: Found, codes: TensorSpec, scale: TensorSpec) -> StoredLayer | LayerError:
    inputs = next(_beside(found, codes.name, INPUTS), None)
    is_scalar = inputs is not None and inputs.elements == 1
    parts = {"weight": codes, "weight_scale": scale, **({"input_scale": inputs} if inputs and is_scalar else {})}
    stem = codes.name.removesuffix(WEIGHT)
    is_of_words = codes.dtype is torch.int32 or (codes.dtype is torch.uint8 and len(codes.shape) == 2)
    signature = None if is_of_words else read_signature(parts)
    if signature is None:
        return unknown_format(found, stem, parts)
    layer = stored_layer(stem, signature, parts)
    unused = () if inputs is None or inputs.name in layer.places.values() else (inputs.name,)
    return replace(layer, unused=unused)
