"""The marks of ComfyUI's quantized layers, in the order in which ComfyUI heeds them (`convert_old_quants`).

Header:   `_quantization_metadata`: {"layers": {NAME: {"format": ...}}}; it replaces whatever else marks these layers
Legacy:   a tensor `scaled_fp8`, heeded if the header has no marks: every layer with NAME.scale_weight is
          float8_e4m3fn, and with two elements multiplied in full precision
Beside:   NAME.comfy_quant, U8: the JSON {"format": ...}
Params:   some formats also read keys from an object "params" in the mark; a key beside "format" wins
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from omni_convert.formats.containers.json_file import parse_json
from omni_convert.formats.dialects.base import Found, LayerError
from omni_convert.formats.errors import CheckpointError, quoted
from omni_convert.formats.finding import Finding

__all__ = [
    "FULL_PRECISION",
    "LEGACY_MARK",
    "LEGACY_NAMES",
    "MARK",
    "METADATA",
    "NESTED",
    "ROTATED",
    "Mark",
    "Marks",
    "absent_layer",
    "bad_mark",
    "has_marks",
    "legacy_mark",
    "prefix_of",
    "read_marks",
]

METADATA = "_quantization_metadata"
MARK = "comfy_quant"
LEGACY_MARK = "scaled_fp8"
LEGACY_NAMES = {"weight_scale": "scale_weight", "input_scale": "scale_input"}
LEGACY_FORMAT = "float8_e4m3fn"
#: The key of layers that are stored quantized and multiplied in the model's dtype.
FULL_PRECISION = "full_precision_matrix_mult"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
MAX_MARK_BYTES = 4096
# Formats whose keys are also read from "params".
NESTED = ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")
#: The one format that is read here and whose weight may be rotated.
ROTATED = "int8_tensorwise"
DEFAULT_ROTATION = 256
REMEDY = "-m keep --dialect comfyui"


@dataclass(frozen=True)
class Mark:
    """The mark that declares a layer quantized.

    Attributes:
        place: prefix of the layer's tensors in the file
        content: the mark that ComfyUI heeds
        is_in_header: it comes from the header
        is_legacy: it follows from `scaled_fp8`
        overruled: content of the layer's `comfy_quant` that another mark replaces; None if there is none
    """

    place: str
    content: Mapping[str, Any]
    is_in_header: bool = False
    is_legacy: bool = False
    overruled: Mapping[str, Any] | None = None

    @property
    def format(self) -> Any:
        return self.content.get("format")

    @property
    def params(self) -> Mapping[str, Any]:
        """The keys under "params"."""
        params = self.content.get("params")
        return params if isinstance(params, Mapping) else {}

    @property
    def is_full_precision(self) -> bool:
        """Whether the layer is multiplied in the model's dtype."""
        return bool(self._heeded.get(FULL_PRECISION))

    @property
    def _heeded(self) -> Mapping[str, Any]:
        """The keys that ComfyUI reads."""
        return {**self.params, **self.content} if self.format in NESTED else self.content

    def number(self, key: str, default: int) -> Any:
        """A key that ComfyUI reads, unchecked."""
        return self._heeded.get(key, default)

    def rotation(self) -> Any:
        """The columns of a group that was rotated, unchecked; None if the weight was not.

        Raises:
            ValueError: readers may disagree about it.
        """
        heeded = _rotation(self._heeded)
        if self.format != ROTATED:
            if _rotation({**self.params, **self.content}) is not None:
                raise ValueError(f"found convrot in a mark of {self.format}, which ComfyUI does not rotate")
            return None
        if _rotation({**self.content, **self.params}) != heeded:
            raise ValueError("found another rotation under params than beside the format")
        if heeded is not None and self._heeded.get("convrot") is not True:
            raise ValueError(f"found convrot {self._heeded.get('convrot')!r:.20}, expected true or false")
        return heeded

    def findings(self, stem: str) -> Iterator[Finding]:
        """Reports oddities of the mark that do not change the weight.

        Args:
            stem: name of the layer
        """
        if self.format not in NESTED and self.params:
            what = f"found {', '.join(sorted(self.params))} under params, where ComfyUI reads none for {self.format}"
            yield Finding("warning", "bad-mark", stem, what, "ComfyUI: ignores them", "write them beside the format")
        differing = [key for key, value in self.params.items() if key in self.content and self.content[key] != value]
        if self.format in NESTED and differing:
            what = f"found another {differing[0]} under params than beside the format, which counts"
            yield Finding("warning", "bad-mark", stem, what, "readers of params alone", REMEDY)
        yield from self._disagreement(stem)

    def _disagreement(self, stem: str) -> Iterator[Finding]:
        """Reports how the layer's own mark differs from the one that counts."""
        if self.overruled is None:
            return
        other, where = Mark(self.place, self.overruled), "the header" if self.is_in_header else LEGACY_MARK
        if other.format != self.format:
            what = f"found {other.format!s:.40} in {MARK}, {self.format} in {where}, which counts"
        elif (_rotation(other._heeded), other.is_full_precision) != (_rotation(self._heeded), self.is_full_precision):
            what = f"found {dict(self.overruled)!s:.80} in {MARK}, {dict(self.content)!s:.80} in {where}, which counts"
        else:
            return
        yield bad_mark(stem, what, f"whoever reads {MARK} alone: other numbers")


def _rotation(settings: Mapping[str, Any]) -> Any:
    return settings.get("convrot_groupsize", DEFAULT_ROTATION) if settings.get("convrot") else None


@dataclass(frozen=True)
class Marks:
    """Everything that is marked in a file.

    Attributes:
        layers: each marked layer, or why its mark cannot be read; in the order of the header and the file
        absent: names in the header of which the file has no tensor
    """

    layers: tuple[Mark | LayerError, ...] = ()
    absent: tuple[str, ...] = field(default=())


def has_marks(found: Found) -> bool:
    """Whether anything in a file is ComfyUI's."""
    is_marked = METADATA in found.metadata or legacy_mark(found) is not None
    return is_marked or next(iter(found.stems(MARK)), None) is not None


def read_marks(found: Found) -> Marks:
    """The marks of every layer.

    Raises:
        CheckpointError: the header's marks are no JSON object.
    """
    prefix, in_header = prefix_of(found), _marks_in_header(found)
    marks: dict[str, Mark | LayerError] = {}
    absent: list[str] = []
    stems = {name.rpartition(".")[0] for name in found.checkpoint}
    for stem, content in in_header.items():
        place = prefix + stem if stem not in stems and prefix + stem in stems else stem
        if place in stems:
            marks[place] = Mark(place, content, is_in_header=True)
        else:
            absent.append(stem)
    legacy = legacy_mark(found) if METADATA not in found.metadata else None
    for place in found.stems(LEGACY_NAMES["weight_scale"]) if legacy is not None else ():
        content = {"format": LEGACY_FORMAT}
        if found.checkpoint[str(legacy)].elements == 2:
            content[FULL_PRECISION] = True
        marks[place] = Mark(place, content, is_legacy=True)
    for place in found.stems(MARK):
        marks[place] = _with_own_mark(found, place, marks.get(place))
    return Marks(tuple(marks.values()), tuple(absent))


def _with_own_mark(found: Found, place: str, stronger: Mark | LayerError | None) -> Mark | LayerError:
    """The mark of a layer that has a `comfy_quant`, and perhaps a mark that overrules it."""
    try:
        content: Mapping[str, Any] = _content(found, place)
    except LayerError as error:
        if not isinstance(stronger, Mark):
            return error
        content = {"format": "no JSON object"}
    return replace(stronger, overruled=content) if isinstance(stronger, Mark) else Mark(place, content)


def _content(found: Found, place: str) -> Mapping[str, Any]:
    """The content of a layer's `comfy_quant`."""
    name = f"{place}.{MARK}"
    spec = found.checkpoint[name]
    if spec.dtype.itemsize == 1 and spec.nbytes <= MAX_MARK_BYTES:
        try:
            mark = json.loads(found.checkpoint.read(name).reshape(-1).view(torch.uint8).numpy().tobytes())
        except (ValueError, RecursionError):
            mark = None
        if isinstance(mark, Mapping):
            return mark
    what = 'found no JSON object, expected {"format": ...}'
    raise LayerError(found, place, f"tensor '{name}': {what}", "bad-mark")


def _marks_in_header(found: Found) -> dict[str, Mapping[str, Any]]:
    where = f"{found.checkpoint.path}: {METADATA} in the header"
    layers = parse_json(found.metadata.get(METADATA, "{}").encode(), where).get("layers", {})
    if not isinstance(layers, Mapping):
        raise CheckpointError(f"{where}: found layers {str(layers)[:40]!r}, expected an object")
    return {stem: mark for stem, mark in layers.items() if isinstance(mark, Mapping)}


def legacy_mark(found: Found) -> str | None:
    """The name of the legacy marker, with whatever prefix the weights have."""
    return next((name for name in found.checkpoint if name.rpartition(".")[2] == LEGACY_MARK), None)


def prefix_of(found: Found) -> str:
    """The prefix that files of a whole model have, if every name begins with it; else empty."""
    mark = legacy_mark(found)
    names: Collection[str] = [name for name in found.checkpoint if name != mark]
    return next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)), "")


def bad_mark(stem: str, what: str, hurts: str, remedy: str = REMEDY) -> Finding:
    """The error about a mark."""
    return Finding("error", "bad-mark", stem, what, hurts, remedy)


def absent_layer(stem: str) -> Finding:
    """The finding about a mark in the header whose layer is not there."""
    what = f"found a mark in the header for {quoted(stem)}, of which there is no tensor"
    return Finding("warning", "bad-mark", stem, what, "ComfyUI: none, if the model has no such layer", REMEDY)
