"""Checks what a GGUF file declares: the model's architecture, the names and types of tensors, and where they lie."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.dialects.gguf_verdicts import COMFYUI_ARCHITECTURES, GUESSED
from omni_convert.formats.families.table import find_family
from omni_convert.formats.finding import Finding

if TYPE_CHECKING:  # the gguf package is slow to import, and few need it
    from omni_convert.formats.containers.gguf_file import GgufReader

__all__ = ["gguf_findings"]

COMFYUI = "ComfyUI-GGUF"
AGAIN = "convert the model again"
#: Bytes of a name, its end included, in stable-diffusion.cpp's build of ggml.
GGML_NAME = 128
ALIGNED = 64


def gguf_findings(file: GgufReader, layers: Container[str], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything that is wrong with what a file declares.

    Args:
        layers: stems of the quantized layers
        config: the config.json beside it; {} if there is none
    """
    yield from _architecture(file.architecture, config)
    for entry in file.entries.values():
        if len(entry.name.encode()) >= GGML_NAME:
            what = f"found a name of {len(entry.name.encode())} bytes, expected less than {GGML_NAME}"
            yield Finding("warning", "long-name", entry.name[:60], what, "stable-diffusion.cpp", "rename the tensor")
        if entry.name.removesuffix(WEIGHT) in layers and len(entry.shape) != 2:
            what = f"found {entry.type.name} of shape {list(entry.shape)}, expected F32 for a tensor that is no matrix"
            yield Finding("error", "wrong-type", entry.name, what, "diffusers: takes the bytes for numbers", AGAIN)
    yield from _unused(file.size, [(entry.begin, entry.nbytes, entry.name) for entry in file.entries.values()])


def _architecture(found: str | None, config: Mapping[str, Any]) -> Iterator[Finding]:
    if found in GUESSED:
        named = "no general.architecture" if found is None else f"general.architecture '{found}'"
        what = f"found {named}, expected the name of the model"
        hurts = f"{COMFYUI}: guesses the model by its tensors, in compatibility mode"
        yield Finding("warning", "no-architecture", "", what, hurts, AGAIN)
        return
    expected = find_family(str(config.get("_class_name"))).gguf.every_architecture if config else None
    if expected is not None and found not in expected and {*expected} & {*COMFYUI_ARCHITECTURES}:
        named = " or ".join(map(repr, expected))
        what = f"found general.architecture {found[:40]!r}, expected {named} by the config beside it"
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
