"""Loads a denoising model from GGUF; diffusers runs it and dequantizes each weight before each use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.gguf_verdicts import DIFFUSERS_TYPES
from omni_convert.formats.errors import CheckpointError

__all__ = ["load_gguf"]

# Types that diffusers reads as plain numbers in any layer.
PLAIN = ("F32", "F16", "BF16")


def load_gguf(path: Path, class_name: str, torch_dtype: torch.dtype, **config: Any) -> nn.Module:
    """A model whose weights are in a GGUF file.

    Args:
        path: the file, or a folder that holds one
        class_name: the model's class in diffusers
        torch_dtype: the dtype in which it computes
        config: `config` and what else `from_single_file` needs to find the model's config.json

    Raises:
        CheckpointError: the file is damaged, of a type that diffusers does not dequantize, or one of several.
    """
    from omni_convert.formats.dialects.gguf import gguf_file_of  # the gguf package is slow to import

    with Checkpoint.open(path) as checkpoint:
        file = gguf_file_of(checkpoint)
        if file is None:
            raise CheckpointError(f"{path}: found no GGUF, expected a .gguf file")
        unknown = sorted({entry.type.name for entry in file.entries.values()} - {*DIFFUSERS_TYPES, *PLAIN})
    if unknown:
        raise CheckpointError(
            f"{file.path}: found {', '.join(unknown)}, which diffusers cannot dequantize, expected types as Q8_0; "
            "use ComfyUI-GGUF or stable-diffusion.cpp, or `omni-convert dequantize`"
        )
    model: nn.Module = getattr(diffusers, class_name).from_single_file(
        str(file.path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch_dtype),
        torch_dtype=torch_dtype,
        **config,
    )
    return model
