"""Denoising models of a pipeline that are in GGUF; diffusers runs them, dequantizing a weight before each use."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import nn

from omni_convert.formats.component import DENOISERS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.gguf_runtimes import DIFFUSERS_TYPES
from omni_convert.formats.json_file import read_json

__all__ = ["load_gguf_components"]

# What diffusers takes as numbers, whatever the layer.
PLAIN = ("F32", "F16", "BF16")


def load_gguf_components(model: str | Path, torch_dtype: torch.dtype) -> dict[str, nn.Module]:
    """Component to model, of those whose folder holds a GGUF file and no safetensors; {} for what is no folder.

    Raises:
        CheckpointError: a file is damaged, or of a type that diffusers does not dequantize.
    """
    found = [folder for name in DENOISERS if _is_gguf(folder := Path(model) / name)]
    if not found:
        return {}
    index = read_json(Path(model) / "model_index.json")
    listed = [folder for folder in found if isinstance(index.get(folder.name), list)]
    return {folder.name: _load(folder, getattr(diffusers, index[folder.name][1]), torch_dtype) for folder in listed}


def _is_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def _load(folder: Path, model_class: type, torch_dtype: torch.dtype) -> nn.Module:
    from omni_convert.formats.checkpoint import Checkpoint
    from omni_convert.formats.dialects.gguf import gguf_file_of

    with Checkpoint.open(folder) as checkpoint:
        file = gguf_file_of(checkpoint)
        assert file is not None, "the folder holds one"
        unknown = sorted({entry.type.name for entry in file.entries.values()} - {*DIFFUSERS_TYPES, *PLAIN})
    if unknown:
        raise CheckpointError(
            f"{file.path}: found {', '.join(unknown)}, which diffusers cannot dequantize, expected types as Q8_0; "
            "use ComfyUI-GGUF or stable-diffusion.cpp, or `omni-convert dequantize`"
        )
    model: nn.Module = model_class.from_single_file(  # type: ignore[attr-defined]  # of diffusers' models
        str(file.path),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch_dtype),
        torch_dtype=torch_dtype,
    )
    return model
