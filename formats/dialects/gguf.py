"""GGUF files: the container states the type of each tensor, so that nothing is guessed.

Tensors:  those of blocks are layers; F32, F16, BF16, F64 and integers are plain tensors
Names:    diffusers', those of the model's own code, and these with ComfyUI's `model.diffusion_model.` before them
Limits:   a tensor of blocks is called NAME.weight; types that the `gguf` package does not dequantize are not read
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import GGUF_SUFFIX
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import (
    Dialect,
    Found,
    JudgedComponent,
    LayerError,
    StoredLayer,
    WrittenSpelling,
    attempt,
)
from omni_convert.formats.dialects.gguf_findings import gguf_findings
from omni_convert.formats.dialects.gguf_verdicts import gguf_verdicts
from omni_convert.formats.dialects.verdict import Verdict
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format

if TYPE_CHECKING:  # the gguf package is slow to import, and few need it
    from omni_convert.formats.containers.gguf_file import GgufReader
    from omni_convert.formats.containers.gguf_header import GgufEntry

__all__ = ["GGUF", "SMALL_ELEMENTS", "gguf_file_of"]

#: ComfyUI-GGUF wants tensors of so many elements or fewer in float32, whatever the type of the rest.
SMALL_ELEMENTS = 1024
HALVES = (torch.bfloat16, torch.float16)

INSTRUCTIONS = """A `.gguf` file holds a model of diffusers, and is read beside its `config.json`:

```python
import torch
from diffusers import GGUFQuantizationConfig, {model_class}

model = {model_class}.from_single_file(
    "{folder}/{file}",
    config="{folder}",
    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    torch_dtype=torch.bfloat16,
)
```"""


class Gguf(Dialect):
    """Recognised by its container."""

    name = "gguf"
    consumers = "diffusers, ComfyUI-GGUF, stable-diffusion.cpp"
    declared_by = "container"
    is_single_file = True
    names_expected = "both"
    recasts_kept_tensors = True
    instructions = INSTRUCTIONS

    def recognises(self, found: Found) -> bool:
        return gguf_file_of(found.checkpoint) is not None

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        from omni_convert.formats.containers.gguf_file import PLAIN_DTYPES

        file = gguf_file_of(found.checkpoint)
        assert file is not None, "recognised"
        for name in found.checkpoint:
            entry = file.entries[name]
            if entry.type.name not in PLAIN_DTYPES:
                yield attempt(_stored_layer, entry, found)

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        file = gguf_file_of(component.checkpoint) if component.checkpoint is not None else None
        return list(gguf_verdicts(file, component.family)) if file is not None else []

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        file = gguf_file_of(found.checkpoint)
        assert file is not None, "recognised"
        return gguf_findings(file, layers, config)

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        return WrittenSpelling() if fmt.method == self.name else super().spelling(fmt, shape)

    def dtype_of_copy(self, spec: TensorSpec, *, is_layer: bool) -> torch.dtype:
        """The dtype of a tensor that is not quantized.

        Weights of layers may stay BF16 or FP16, as ComfyUI-GGUF's quantizer leaves them: they can be a good part of the
        model. Other tensors may not, since diffusers reads BF16 in linear layers only.

        Args:
            is_layer: it is the weight of a layer that could have been quantized
        """
        may_stay = is_layer and spec.dtype in HALVES and spec.elements > SMALL_ELEMENTS
        return torch.float32 if spec.dtype.is_floating_point and not may_stay else spec.dtype


def _stored_layer(entry: GgufEntry, found: Found) -> StoredLayer:
    from omni_convert.formats.schemes.gguf import StoredGguf, is_dequantized

    stem = entry.name.rpartition(".")[0]
    where = f"tensor '{entry.name}'"
    if not is_dequantized(entry.type.name):
        what = "expected one that the gguf package dequantizes; convert the original again"
        raise LayerError(found, stem, f"{where}: found type {entry.type.name}, {what}")
    if not entry.name.endswith(WEIGHT):
        what = f"expected blocks in a tensor called NAME{WEIGHT} only; convert the original again"
        raise LayerError(found, stem, f"{where}: found {entry.type.name}, {what}")
    shape = (entry.shape[0], math.prod(entry.shape[1:]))
    return StoredLayer(entry.name.removesuffix(WEIGHT), StoredGguf(entry.type.name, entry.shape), shape)


def gguf_file_of(checkpoint: Checkpoint) -> GgufReader | None:
    """The file that a checkpoint consists of, if that is GGUF."""
    files = [file for name, file in checkpoint.files.items() if name.endswith(GGUF_SUFFIX)]
    return cast("GgufReader", files[0]) if files else None


GGUF = Gguf()
