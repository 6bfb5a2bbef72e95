"""What is wrong with a GGUF file beyond its bytes: what it says it is, its names and types; and against a reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from omni_convert.convert.source.component_folder import model_class
from omni_convert.convert.source.original_names import convert_names, shapes_of, under_diffusers_names
from omni_convert.formats.checks.reading import TolerantReading
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.gguf import gguf_file_of
from omni_convert.formats.dialects.gguf_verdicts import COMFYUI_ARCHITECTURES
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.table import find_family
from omni_convert.formats.finding import Finding
from omni_convert.formats.rows import tile_ranges
from omni_convert.formats.views.base import dequantized_view
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["check_gguf", "compare_gguf"]

COMFYUI = "ComfyUI-GGUF"
READERS = "diffusers, ComfyUI-GGUF"
AGAIN = "convert the model again"
#: Bytes of a name, its end included, in stable-diffusion.cpp's build of ggml.
GGML_NAME = 128
ALIGNED = 64
# Relative errors that types of so many bits, and numbers that are only stored otherwise, do not reach.
LIMITS = ((8.0, 0.03), (4.0, 0.3), (0.0, 1.0))
PLAIN_LIMIT = 0.01


def check_gguf(reading: TolerantReading, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything that is wrong with what a file says.

    Args:
        config: the config.json beside it; {} if there is none
    """
    file = gguf_file_of(reading.quantized.checkpoint)
    assert file is not None, "of the dialect"
    yield from _architecture(file.architecture, config)
    for entry in file.entries.values():
        if len(entry.name.encode()) >= GGML_NAME:
            what = f"found a name of {len(entry.name.encode())} bytes, expected less than {GGML_NAME}"
            yield Finding("warning", "long-name", entry.name[:60], what, "stable-diffusion.cpp", "rename the tensor")
        if entry.name.removesuffix(".weight") in reading.shapes and len(entry.shape) != 2:
            what = f"found {entry.type.name} of shape {list(entry.shape)}, expected F32 of what is no matrix"
            yield Finding("error", "wrong-type", entry.name, what, "diffusers: takes the bytes for numbers", AGAIN)
    yield from _unused(file.size, [(entry.begin, entry.nbytes, entry.name) for entry in file.entries.values()])
    if model_class(config) != "unknown" and not reading.findings:
        yield from _names(reading.quantized, config)


def _architecture(found: str | None, config: Mapping[str, Any]) -> Iterator[Finding]:
    if found is None:
        what = "found no general.architecture, expected the name of the model"
        hurts = f"{COMFYUI}: guesses the model by its tensors, in compatibility mode"
        yield Finding("warning", "no-architecture", "", what, hurts, AGAIN)
        return
    expected = find_family(model_class(config)).gguf.architecture if config else None
    if expected is not None and expected != found and expected in COMFYUI_ARCHITECTURES:
        what = f"found general.architecture {found[:40]!r}, expected {expected!r} by the config beside it"
        yield Finding("error", "wrong-architecture", "", what, f"{COMFYUI}: refuses it or builds another model", AGAIN)
    elif expected is None and found not in COMFYUI_ARCHITECTURES:
        what = f"found general.architecture {found[:40]!r}, which is no image model that {COMFYUI} knows"
        yield Finding("warning", "wrong-architecture", "", what, f"{COMFYUI}: refuses the file", AGAIN)


def _unused(size: int, extents: list[tuple[int, int, str]]) -> Iterator[Finding]:
    """Bytes that belong to nothing; padding is less than an alignment."""
    ends = [begin + nbytes for begin, nbytes, _ in extents]
    for (begin, _, name), end in zip([*extents[1:], (size, 0, "the end")], ends, strict=True):
        if begin - end >= ALIGNED:
            what = f"found {begin - end} bytes before {name[:60]!r} that belong to no tensor"
            hurts = "nobody, unless a tensor is missing"
            yield Finding("warning", "unused-bytes", "" if begin == size else name, what, hurts, AGAIN)


def _names(quantized: QuantizedCheckpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the tensors make the model, under diffusers' names or its own code's."""
    import diffusers

    view = dequantized_view(quantized)
    try:
        converted = convert_names(view, config)
    except CheckpointError as error:
        what = str(error).removeprefix(f"{quantized.checkpoint.path}: ")
        yield Finding("error", "unknown-names", "", what, f"{READERS}: refuse it or miss weights", AGAIN)
        return
    if converted is not None or not hasattr(diffusers, model_class(config)):
        return
    for name, shape in shapes_of(getattr(diffusers, model_class(config)), config).items():
        if name in view and view[name].elements != math.prod(shape):
            what = f"found {list(view[name].shape)}, expected {list(shape)} by the config beside it"
            yield Finding("error", "wrong-shape", name, what, f"{READERS}: refuse it", AGAIN)


def compare_gguf(
    quantized: QuantizedCheckpoint, reference: Checkpoint, config: Mapping[str, Any], errors: dict[str, float]
) -> list[Finding]:
    """Findings against the reference, under its names; fills `errors` with those of the layers.

    Raises:
        CheckpointError: a file cannot be read.
    """
    findings: list[Finding] = []
    limit = max((_limit(layer.nbytes * 8 / _elements(layer.shape)) for layer in quantized.layers.values()), default=0)
    view = under_diffusers_names(dequantized_view(quantized), config)[0]
    storage = getattr(view, "storage", {})
    for name, spec in view.items():
        other = reference.get(name)
        stem = name.removesuffix(".weight")
        if other is None or other.shape != spec.shape:
            if name in storage:
                what = f"found {list(other.shape) if other else 'no such weight'} in the reference"
                what += f", expected {list(spec.shape)}"
                findings.append(Finding("warning", "not-in-reference", stem, what, "", "give the model it was made of"))
            continue
        error = _relative_error(view, reference, name)
        if name in storage:
            errors[stem] = error
        if error > (limit if name in storage else PLAIN_LIMIT):
            what = f"found weights {error:.0%} off the reference"
            hurts = f"{READERS}: compute with other weights"
            findings.append(Finding("error", "differs-from-reference", stem, what, hurts, AGAIN))
    return findings


def _elements(shape: tuple[int, int]) -> int:
    return max(1, shape[0] * shape[1])


def _limit(bits: float) -> float:
    return next(limit for least, limit in LIMITS if bits >= least)


def _relative_error(view: Checkpoint, reference: Checkpoint, name: str) -> float:
    """||W - W'|| / ||W||; NaN counts as infinite."""
    shape = view[name].shape
    difference = total = 0.0
    for start, stop in tile_ranges(shape) if shape else [(0, 1)]:
        found = view.read_rows(name, start, stop) if shape else view.read(name)
        wanted = (reference.read_rows(name, start, stop) if shape else reference.read(name)).float()
        difference += float((found.float() - wanted).square_().sum(dtype=torch.float64))
        total += float(wanted.square().sum(dtype=torch.float64))
    ratio = (difference / total) ** 0.5 if total else (0.0 if difference == 0 else float("inf"))
    return ratio if ratio == ratio else float("inf")
