"""Lets plain pickle hold modules with float8 buffers.

As of torch 2.13, pickle cannot write a tensor of a float8 dtype, because no typed storage class of torch has one;
`torch.save` can. What is pickled here are the bytes, as uint8, and the dtypes beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["module_state", "restore_buffers"]

DTYPES = "_float8_dtypes"


def module_state(module: nn.Module) -> dict[str, Any]:
    """The value for `__getstate__` of a module; nothing is copied."""
    state = nn.Module.__getstate__(module)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    buffers = state["_buffers"]
    dtypes = {name: tensor.dtype for name, tensor in buffers.items() if tensor is not None and _is_float8(tensor)}
    as_bytes = {name: tensor.view(torch.uint8) if name in dtypes else tensor for name, tensor in buffers.items()}
    return {**state, "_buffers": as_bytes, DTYPES: dtypes}


def restore_buffers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `module_state`: the `__dict__` of the module."""
    dtypes = state.get(DTYPES, {})
    buffers = {
        name: tensor.view(dtypes[name]) if name in dtypes else tensor for name, tensor in state["_buffers"].items()
    }
    return {**{name: value for name, value in state.items() if name != DTYPES}, "_buffers": buffers}


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1
