"""Prints what becomes of single files of every architecture, from runs on tiny models of diffusers' classes.

    python scripts/single_file_table.py [MODEL ...]

Each model is one file under the names of its own code, with ComfyUI's prefix and a VAE beside it. Each cell is a
conversion whose result was verified, dequantized and compared with the model; `tests/test_single_file_table.py` runs
some of them against the table in `convert/source/README.md`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, save_model  # type: ignore[import-not-found]  # beside it
from torch import Tensor

from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.families.original_names import OriginalTensor
from omni_convert.formats.families.table import find_family

__all__ = ["COLUMNS", "cells_of", "line_of"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREFIX = "model.diffusion_model."
#: Column → options of the recipe, and the largest error of a weight.
COLUMNS: dict[str, tuple[dict[str, Any], float]] = {
    "fp8, vLLM-Omni": ({"method": "fp8"}, 0.04),
    "fp8, our loader": ({"method": "fp8", "runtime": "diffusers"}, 0.04),
    "ComfyUI": ({"method": "fp8", "dialect": "comfyui"}, 0.04),
    "GGUF": ({"method": "gguf"}, 0.02),
}
WITHOUT_CONFIG = ("ComfyUI", "GGUF")
READERS = {
    "fp8, vLLM-Omni": "vLLM-Omni",
    "fp8, our loader": "omni_convert",
    "ComfyUI": "ComfyUI",
    "GGUF": "ComfyUI-GGUF",
}


def cells_of(name: str, folder: Path) -> Iterator[str]:
    """What becomes of a model's file, for each column: `right`, what else it is, or why it is refused.

    Args:
        folder: an empty one
    """
    kind = MODELS[name][0]
    save_model(name, folder / "model")
    tensors = load_file(folder / "model" / WEIGHTS)
    file = _single_file(name, tensors, folder)
    for column, (options, limit) in COLUMNS.items():
        config = None if column in WITHOUT_CONFIG and _is_told(name) else str(folder / "model")
        try:
            report = convert_checkpoint(file, folder / column, Recipe(device="cpu", config=config, **options))
        except OmniConvertError as error:
            yield _shortened(str(error), kind)
            continue
        cell = _judged(column, folder, tensors, limit)
        names = next((note for note in report.notes if "has diffusers' names, since" in note), None)
        yield cell if names is None else _shortened(names, kind)


def _is_told(name: str) -> bool:
    """Whether the tensors of so small a model tell its class; Wan-Animate's do in the published size alone."""
    kind = MODELS[name][0]
    return name != "wan_animate" and any(rule.model_class == kind for rule in find_family(kind).config)


def _shortened(reason: str, kind: str) -> str:
    """A reason without paths, remedies, details in brackets, and the name of the class."""
    reason = re.sub(r"^\S+?(/config.json)?: ", "", reason.partition("; ")[0]).replace(kind, "the class")
    return reason.partition(": found names")[0].removesuffix(", expected a model of which they are")


def _single_file(name: str, tensors: dict[str, Tensor], folder: Path) -> Path:
    specs = {key: TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    found = find_family(MODELS[name][0]).original_tensors(specs)
    if found is not None:
        rows = {
            key: [tensors[run.source][run.start : run.start + run.count] for run in each.runs]
            for key, each in found.items()
        }
        tensors = {key: torch.cat(rows[key]).reshape(each.shape) for key, each in found.items()}
    file = folder / f"{name}.safetensors"
    beside = {"vae.decoder.conv_in.weight": torch.ones(8, 4, 3, 3)}
    save_file({**{f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}, **beside}, file)
    return file


def _joined(original: OriginalTensor, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[run.source][run.start : run.start + run.count] for run in original.runs])


def _judged(column: str, folder: Path, tensors: dict[str, Tensor], limit: float) -> str:
    """Whether a result is sound, loads, and stands for the model."""
    output = folder / column
    source = resolve_source(output if column != "GGUF" else next(output.glob("*.gguf")))
    if not (output / "config.json").exists():
        (output / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    (verified,) = verify_source(source, resolve_source(folder / "model"))
    (inspected,) = inspect_source(source)
    errors = [finding for finding in verified.findings if finding.severity == "error"]
    if errors:
        return f"unsound: {errors[0].check}: {errors[0].what}"
    if max(verified.errors.values(), default=1.0) > limit:
        return f"wrong by {max(verified.errors.values()):.1%}"
    verdict = next(each for each in inspected.runtimes if each.runtime.startswith(READERS[column]))
    if verdict.outcome != "loads":
        return f"sound, but {verdict.runtime} {verdict.outcome}: {verdict}"
    convert_checkpoint(source.path, folder / f"{column} back", Recipe("dequantize", device="cpu"))
    back = load_file(folder / f"{column} back" / WEIGHTS)
    lacking = tensors.keys() ^ back.keys()
    return "right" if not lacking else f"dequantized to other tensors: {min(lacking)}"


def line_of(name: str, cells: Sequence[str], reasons: list[str]) -> str:
    """A line of the table; reasons for what is not right are collected and numbered."""
    shown = []
    for cell in cells:
        if cell != "right" and cell not in reasons:
            reasons.append(cell)
        shown.append(cell if cell == "right" else f"({reasons.index(cell) + 1})")
    return f"| {name} | {' | '.join(shown)} |"


def main() -> None:
    """Prints the table, and each reason once."""
    reasons: list[str] = []
    print(f"| model | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            print(line_of(name, list(cells_of(name, Path(folder))), reasons), flush=True)
    print()
    for number, reason in enumerate(reasons, start=1):
        print(f"{number}. {reason}")


if __name__ == "__main__":
    main()
