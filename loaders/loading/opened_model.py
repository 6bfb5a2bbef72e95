"""Loads denoising models whose layers are spelled as another tool does, and that no library loads.

The model is built from its config, without weights. Its quantized layers hold the canonical tensors of their formats;
layers that files have in one, under the names of the model's own code, are split as diffusers has them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from omni_convert.formats.checks.meaning import refuse_doubts
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.dialects.config_block import read_claimed_block
from omni_convert.formats.dialects.found import describe
from omni_convert.formats.errors import CheckpointError, RecipeError, counted
from omni_convert.formats.views.opened import QuantizedCheckpoint, Reading, read_layers
from omni_convert.formats.views.original_names import layers_under_diffusers_names
from omni_convert.loaders.loading.install import refuse_unexpected, restore_linears
from omni_convert.loaders.loading.opened import install_opened
from omni_convert.loaders.loading.pipeline_files import INDEX, loaded_files, open_weights
from omni_convert.loaders.loading.streamed import empty_model_of_diffusers

__all__ = ["load_opened_models"]

CONFIG = "config.json"


def load_opened_models(
    folder: Path,
    torch_dtype: torch.dtype,
    given: Collection[str] = (),
    requested: Collection[str] = (),
    variant: str | None = None,
) -> dict[str, nn.Module]:
    """Denoising models of a pipeline in dialects that are read layer by layer, by component.

    Args:
        folder: that of the pipeline
        torch_dtype: of everything that is not quantized
        given: components that are not loaded from the folder
        requested: components that a request would quantize
        variant: that of `from_pretrained`

    Raises:
        CheckpointError: a file is damaged, its meaning is not certain, or it is not the model of the config.
        RecipeError: such a component is requested.
    """
    index = read_json(folder / INDEX)
    models: dict[str, nn.Module] = {}
    for name in DENOISERS:
        entry = index.get(name)
        if name in given or not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers":
            continue
        model = _load(folder / name, str(entry[1]), torch_dtype, variant)
        if model is not None and name in requested:
            raise RecipeError(
                f"quantization: {name} is quantized already, as {model.hf_quantizer.dialect} spells it; leave "
                "quantization out, or start from the unquantized model"
            )
        models |= {} if model is None else {name: model}
    return models


class OpenedQuantizer:
    """Stands where diffusers looks for a model's quantizer, and keeps it from saving tensors under names of no tool."""

    is_serializable = False
    pre_quantized = True

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        self.quantization_config = SimpleNamespace(quant_method=dialect)

    def dequantize(self, model: Any) -> Any:
        """Puts plain layers in the place of quantized ones."""
        restore_linears(model, model.dtype)
        del model.hf_quantizer
        return model


def _load(folder: Path, class_name: str, torch_dtype: torch.dtype, variant: str | None) -> Any:
    """The model in a folder; None if a library loads it, or nobody does."""
    files = loaded_files(folder, "diffusers", variant)
    model_class = getattr(diffusers, class_name, None)
    if not files or model_class is None or not (folder / CONFIG).is_file():
        return None
    with open_weights(files) as checkpoint:
        reading = read_layers(describe(checkpoint, folder))
        if not _is_opened(reading):
            return None
        refuse_doubts(reading, values=True)
        opened, _ = layers_under_diffusers_names(reading.quantized, read_json(folder / CONFIG))
        model: Any
        model, dtypes = empty_model_of_diffusers(model_class, folder, torch_dtype)
        _fill(model, dtypes, opened, folder)
    model.hf_quantizer = OpenedQuantizer(str(opened.dialect))
    return model


def _is_opened(reading: Reading) -> bool:
    formats = [layer.format for layer in (*reading.layers.values(), *reading.damaged)]
    is_run = reading.dialect is not None and reading.dialect.is_run_opened(formats)
    return is_run and read_claimed_block(reading.found.block) is None


def _fill(model: nn.Module, dtypes: Mapping[str, torch.dtype], opened: QuantizedCheckpoint, where: Path) -> None:
    """Gives a model without weights those of a checkpoint.

    Args:
        model: on the meta device
        dtypes: in which it computes with its tensors of floats, by name
        opened: under the names of the model
    """
    for layer in opened.layers.values():
        install_opened(model, layer)
    refuse_unexpected(model, opened.kept, str(where))
    tensors = {name: opened.checkpoint.read(stored) for name, stored in opened.kept.items()}
    plain = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    try:
        model.load_state_dict(plain, strict=False, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: does not fit {type(model).__name__} ({reason}); download it again") from None
    missing = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise CheckpointError(
            f"{where}: found {counted(len(missing), 'tensor')} of {type(model).__name__} missing "
            f"({', '.join(missing[:3])}), expected all; the checkpoint is incomplete or belongs to another model"
        )
