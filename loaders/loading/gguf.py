"""Loads a denoising model from GGUF. diffusers reads the file; our layers hold its blocks and decode them in cache.

diffusers turns original names into its own, splits joined layers, and puts a `GGUFLinear` where a weight has blocks.
Each of these becomes a `QuantizedLinear` with the same bytes. Types that diffusers lacks are made known to it first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import gguf
import torch
from diffusers.quantizers.gguf import utils as of_diffusers
from torch import Tensor, nn

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.gguf_file import PLAIN_DTYPES
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.schemes.gguf import StoredGguf, is_dequantized
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear

__all__ = ["load_gguf"]


def load_gguf(path: Path, class_name: str, torch_dtype: torch.dtype, **config: Any) -> nn.Module:
    """A model whose weights are in a GGUF file.

    Args:
        path: the file, or a folder that holds one
        class_name: the model's class in diffusers
        torch_dtype: the dtype in which it computes
        config: `config` and what else `from_single_file` needs to find the model's config.json

    Raises:
        CheckpointError: the file is damaged, of a type that nobody dequantizes, or one of several.
    """
    from omni_convert.formats.dialects.gguf import gguf_file_of  # the gguf package is slow to import

    with Checkpoint.open(path) as checkpoint:
        file = gguf_file_of(checkpoint)
        if file is None:
            raise CheckpointError(f"{path}: found no GGUF, expected a .gguf file")
        types = {entry.type.name for entry in file.entries.values()} - PLAIN_DTYPES.keys()
    unknown = sorted(name for name in types if not is_dequantized(name))
    if unknown:
        raise CheckpointError(
            f"{file.path}: found {', '.join(unknown)}, which the gguf package does not dequantize, expected types as "
            "Q8_0; convert the original again"
        )
    _make_known(types)
    model: nn.Module = getattr(diffusers, class_name).from_single_file(
        str(file.path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch_dtype),
        torch_dtype=torch_dtype,
        **config,
    )
    _replace_layers(model, torch_dtype, file.path)
    return model


def _make_known(types: set[str]) -> None:
    """Makes diffusers read these types, which it refuses if it cannot dequantize them."""
    functions: dict[gguf.GGMLQuantizationType, Callable[..., Tensor]] = of_diffusers.dequantize_functions
    for name in types:
        kind = gguf.GGMLQuantizationType[name]
        if kind not in functions:
            functions[kind] = partial(_dequantize_blocks, name)
            of_diffusers.SUPPORTED_GGUF_QUANT_TYPES.append(kind)


def _dequantize_blocks(type_name: str, blocks: Tensor, block_size: int, *_: Any) -> Tensor:
    """Numbers of blocks, uint8 [n, bytes] to float32 [n, block_size]."""
    return StoredGguf(type_name, (len(blocks), block_size)).dequantize({"weight": blocks})


def _replace_layers(model: nn.Module, torch_dtype: torch.dtype, where: Path) -> None:
    """Puts our layers in the place of diffusers'; a weight that is not quantized gets the model's dtype.

    Raises:
        CheckpointError: a layer has scales that are no numbers.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, of_diffusers.GGUFLinear):
            model.set_submodule(name, _replacement(layer, torch_dtype, f"{where}: {name}"))


def _replacement(layer: Any, torch_dtype: torch.dtype, where: str) -> nn.Module:
    kind = getattr(layer.weight, "quant_type", None)
    if kind is None or kind.name in PLAIN_DTYPES:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        weight = of_diffusers.dequantize_gguf_tensor(layer.weight).to(torch_dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        return plain
    fmt = StoredGguf(kind.name, (layer.out_features, layer.in_features))
    tensors = {"weight": layer.weight.as_tensor().detach()}
    reason = fmt.flaw(tensors)
    if reason is not None:
        raise CheckpointError(f"{where}: {reason}; download or convert it again")
    return QuantizedLinear(fmt, tensors, layer.bias, in_features=layer.in_features)
