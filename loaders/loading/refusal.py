"""Refuses quantized layers that no library would read right.

Their config declares nothing, so that libraries would take the codes for weights; they are in a dialect that this
loader does not read; or their meaning is not certain.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from omni_convert.formats.checks.meaning import refuse_doubts
from omni_convert.formats.checks.undeclared import undeclared_codes
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.base import JudgedComponent
from omni_convert.formats.dialects.found import describe
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.views.opened import Reading, read_layers
from omni_convert.loaders.loading.pipeline_files import INDEX, loaded_files, open_weights

__all__ = ["refuse_undeclared"]

# The dialects of which every format is read here, the usual one first.
READ_HERE = ("vllm-omni", "modelopt")
CONFIG, BLOCK = "config.json", "quantization_config"


def refuse_undeclared(folder: Path, given: Collection[str] = (), variant: str | None = None) -> None:
    """Looks at the headers of the files that are loaded for a pipeline's components, and at a few rows.

    Weights that are cast to FP8 and have no scales are numbers, and pass. What only all values show is not looked for:
    `omni-convert verify` finds scales that were exchanged, and what is wrong in layers that are not read here.

    Args:
        folder: that of the pipeline
        given: components that are not loaded from the folder
        variant: that of `from_pretrained`

    Raises:
        CheckpointError: a component has quantized layers and no block, is in a dialect that is not read here, or has no
            certain meaning; or a file is damaged.
    """
    index = read_json(folder / INDEX)
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry and name not in given}
    for component, (library, *_) in listed.items():
        config = folder / component / CONFIG
        files = loaded_files(folder / component, str(library), variant)
        if not files or not config.is_file():
            continue
        is_declared = bool(read_json(config).get(BLOCK))
        if is_declared and library == "transformers":  # which reads more spellings than we do
            continue
        with open_weights(files) as checkpoint:
            reading = read_layers(describe(checkpoint, folder / component))
            _refuse_dialect(reading, folder / component, is_declared)
            if not is_declared:
                _refuse_codes(checkpoint, folder / component)
            if reading.dialect is not None or not is_declared:  # a library reads its own blocks
                refuse_doubts(reading, values=True)


def _refuse_dialect(reading: Reading, folder: Path, is_declared: bool) -> None:
    dialect = reading.dialect
    # Without a block or marks it could be any dialect that has lost its block.
    if dialect is None or not (is_declared or dialect.declared_by == "marks"):
        return
    readers = [each for each in dialect.verdicts(JudgedComponent({})) if each.runtime in (OURS, DIFFUSERS)]
    if not is_declared or all(each.outcome != "loads" for each in readers):  # only marked, it is no denoising model
        raise CheckpointError(
            f"{folder}: found the spelling of {dialect.shown_name(reading.found)}, which this loader does not read; "
            f"{_remedy(reading, folder)}"
        )


def _remedy(reading: Reading, folder: Path) -> str:
    """How to bring a component to a dialect that is read here."""
    if reading.is_unreadable:
        return "take the original model"
    for name in READ_HERE:
        spellings = (DIALECTS[name].spelling(layer.format, layer.shape) for layer in reading.layers.values())
        if not any(isinstance(spelling, str) for spelling in spellings):
            command = f"omni-convert {folder.parent} -m keep --dialect {name}"
            return f"`{command}` re-encodes it without changing a value"
    return f"`omni-convert {folder.parent} -m METHOD` quantizes again, `omni-convert dequantize` gives BF16"


def _refuse_codes(checkpoint: Checkpoint, folder: Path) -> None:
    for codes in undeclared_codes(checkpoint):
        if codes.companions or not codes.spec.dtype.is_floating_point:
            found = f"{DTYPE_NAMES[codes.spec.dtype]} codes" + (
                f" and {codes.companions[0]}" if codes.companions else ""
            )
            raise CheckpointError(
                f"{folder / CONFIG}: found no {BLOCK}, but '{codes.stem}' holds {found}, which would be taken for "
                "plain weights; expected the block that the layers were written with: restore the file, or convert "
                "again"
            )
