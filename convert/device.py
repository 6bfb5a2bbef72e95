"""Chooses the device on which torch computes."""

from __future__ import annotations

import torch

from omni_convert.formats.errors import RecipeError

__all__ = ["resolve_device"]


def resolve_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first CUDA device, or else the CPU.

    Raises:
        RecipeError: torch does not know the device, or the machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RecipeError(
            f"--device: found '{name}', which this torch cannot use ({reason}); expected auto, cpu, cuda or cuda:N"
        ) from None
    return device
