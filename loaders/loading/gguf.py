"""Loads a denoising model from GGUF; diffusers runs it and dequantizes each weight before each use."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import nn

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.gguf_verdicts import DIFFUSERS_TYPES
from omni_convert.formats.errors import CheckpointError

__all__ = ["load_gguf"]

# Types that diffusers reads as plain numbers in any layer.
PLAIN = ("F32", "F16", "BF16")


def load_gguf(folder: Path, class_name: str, torch_dtype: torch.dtype) -> nn.Module:
    """A component whose folder holds a GGUF file and its config.

    Args:
        folder: that of the component
        class_name: its class in diffusers
        torch_dtype: the dtype in which it computes

    Raises:
        CheckpointError: the file is damaged, of a type that diffusers does not dequantize, or one of several.
    """
    from omni_convert.formats.dialects.gguf import gguf_file_of  # the gguf package is slow to import

    with Checkpoint.open(folder) as checkpoint:
        file = gguf_file_of(checkpoint)
        assert file is not None, "the folder holds one"
        unknown = sorted({entry.type.name for entry in file.entries.values()} - {*DIFFUSERS_TYPES, *PLAIN})
    if unknown:
        raise CheckpointError(
            f"{file.path}: found {', '.join(unknown)}, which diffusers cannot dequantize, expected types as Q8_0; "
            "use ComfyUI-GGUF or stable-diffusion.cpp, or `omni-convert dequantize`"
        )
    model: nn.Module = getattr(diffusers, class_name).from_single_file(
        str(file.path),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch_dtype),
        torch_dtype=torch_dtype,
    )
    return model
