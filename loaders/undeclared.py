"""Quantized layers of which the config beside them does not speak: libraries would take their codes for weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.json_file import read_json
from omni_convert.formats.leaf import CODES, COMPANIONS, LOW_BIT
from omni_convert.formats.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.loaders.checkpoint_headers import read_headers

__all__ = ["refuse_undeclared"]

CONFIG, BLOCK = "config.json", "quantization_config"


def refuse_undeclared(model: str | Path, given: Collection[str] = ()) -> None:
    """Looks at the headers of a pipeline's components; of what is no folder, at nothing.

    Weights that are cast to FP8 and have no scales are numbers, and pass.

    Args:
        given: components that are not loaded from the folder

    Raises:
        CheckpointError: a component has quantized layers and no block; or one of its files is damaged.
    """
    index = Path(model) / "model_index.json"
    if not index.is_file():
        return
    listed = [name for name, entry in read_json(index).items() if isinstance(entry, list) and name not in given]
    for folder in (Path(model) / name for name in listed):
        files = sorted(folder.glob("*.safetensors"))
        if files and (folder / CONFIG).is_file() and not read_json(folder / CONFIG).get(BLOCK):
            _refuse_codes(read_headers(files), folder)


def _refuse_codes(specs: Mapping[str, TensorSpec], folder: Path) -> None:
    for name, spec in specs.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in CODES or spec.dtype not in LOW_BIT or len(spec.shape) < 2:
            continue
        beside = [companion for companion in COMPANIONS if f"{stem}.{companion}" in specs]
        if beside or not spec.dtype.is_floating_point:
            found = f"{DTYPE_NAMES[spec.dtype]} codes" + (f" and {beside[0]}" if beside else "")
            raise CheckpointError(
                f"{folder / CONFIG}: found no {BLOCK}, but '{stem}' holds {found}, which would be taken for plain "
                "weights; expected the block that the layers were written with: restore the file, or convert again"
            )
