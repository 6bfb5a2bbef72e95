"""How bitsandbytes serializes a component: 4-bit tables of diffusers and transformers, and LLM.int8; only read.

Tensors:  NAME.weight                                U8 [out * in / 2, 1], even element in the high nibble
          NAME.weight.absmax                         F32 [blocks], or U8 where it is quantized itself (nested):
          NAME.weight.nested_absmax                  F32 [blocks / 256]
          NAME.weight.nested_quant_map               F32 [256]; absmax = map[code] * nested_absmax + nested_offset
          NAME.weight.quant_map                      F32 [16]
          NAME.weight.quant_state.bitsandbytes__nf4  U8, JSON: quant_type, blocksize, shape, nested_offset; or __fp4
          INT8: NAME.weight I8 [out, in], NAME.SCB F32 [out], NAME.weight_format; W = code * SCB / 127
Block:    {"quant_method": "bitsandbytes", "load_in_4bit": true, "llm_int8_skip_modules": [...], ...}
Limits:   a weight in which a block ends within the last row is not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.base import Dialect, Found, LayerError, Spelling, StoredLayer, attempt
from omni_convert.formats.dialects.codec import Codec
from omni_convert.formats.dialects.verdict import DIFFUSERS, REQUANTIZE, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.foreign import Codebook, Scaled

__all__ = ["BITSANDBYTES"]

STATE = "quant_state.bitsandbytes__"
NAMES = {"weight_scale": "weight.absmax", "table": "weight.quant_map"}
NESTED = ("nested_absmax", "nested_quant_map")
# Scales of absmax that share one of their own.
NESTED_BLOCK = 256
LARGEST_INT8 = 127.0
MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
class _Flat(Codec):
    """Rows of the weight in a column of bytes."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        return TensorLayout(layout.dtype, (rows * columns, 1))

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return stored.view(-1, layout.shape[1])

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        columns = layout.shape[1]
        return self.decode(checkpoint.read_rows(name, start * columns, stop * columns), layout)


@dataclass(frozen=True)
class _Absmax(Codec):
    """The scales of blocks, one after the other.

    Attributes:
        offset: what is added to scales that are quantized themselves; None for plain ones
    """

    offset: float | None

    def stored(self, layout: TensorLayout) -> TensorLayout:
        dtype = torch.float32 if self.offset is None else torch.uint8
        return TensorLayout(dtype, (layout.shape[0] * layout.shape[1],))

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return stored.view(-1, layout.shape[1])

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        first, last = start * layout.shape[1], stop * layout.shape[1]
        stored = checkpoint.read_rows(name, first, last)
        if self.offset is None:
            return self.decode(stored, layout)
        scales, table = (checkpoint.read(f"{name.removesuffix('absmax')}{each}") for each in NESTED)
        scale = scales[torch.arange(first, last) // NESTED_BLOCK]
        return self.decode(table[stored.long()] * scale + self.offset, layout)


@dataclass(frozen=True)
class _LargestOfRow(Codec):
    """The largest magnitude of a row, instead of the scale of its integers."""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return TensorLayout(layout.dtype, layout.shape[:1])

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return (stored / LARGEST_INT8).view(-1, 1)


class BitsAndBytes(Dialect):
    """See the module."""

    name = "bitsandbytes"
    looks_up_model_names = True
    consumers = "diffusers, transformers"
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "quantizes with bitsandbytes online only, and knows no key of its block"),
        Verdict(DIFFUSERS, "loads", "with bitsandbytes installed, on a GPU; so does transformers"),
        REQUANTIZE,
        UNMARKED,
    )

    def recognises(self, found: Found) -> bool:
        return found.quant_method == "bitsandbytes" or any(STATE in name for name in found.checkpoint)

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        for stem in found.stems():
            weight = found.checkpoint[f"{stem}.weight"]
            if weight.dtype is torch.int8 and len(weight.shape) == 2:
                yield attempt(_int8_layer, found, stem)
            elif weight.dtype is torch.uint8:
                yield attempt(_layer, found, stem)

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        listed = block.get("llm_int8_skip_modules")
        entries = listed if isinstance(listed, list) else ["lm_head"]
        return bool(block) and not any(f".{entry}." in f".{stem}." for entry in entries)


def _int8_layer(found: Found, stem: str) -> StoredLayer:
    rows, columns = found.checkpoint[f"{stem}.weight"].shape
    if found.get(stem, "SCB") is None:
        what = f"tensor '{stem}.SCB' is missing, expected with LLM.int8's codes"
        raise LayerError(found, stem, what, "missing-companion")
    spelling = Spelling({"weight_scale": "SCB"}, {"weight_scale": _LargestOfRow()})
    marks = (f"{stem}.weight_format",) if found.get(stem, "weight_format") is not None else ()
    return StoredLayer(stem, Scaled("int8", torch.int8), (rows, columns), spelling, unused=marks)


def _layer(found: Found, stem: str) -> StoredLayer:
    """A layer of 4-bit codes, from the JSON beside it."""
    where = f"layer '{stem}'"
    mark = next((name for name in found.checkpoint if name.startswith(f"{stem}.weight.{STATE}")), None)
    if mark is None:
        what = f"{where}: found codes without quant_state, expected bitsandbytes' JSON beside them"
        raise LayerError(found, stem, what, "missing-companion")
    method, block, shape, offset = _state(found, stem, mark)
    rows, columns = shape
    fmt = Codebook.for_columns(method, block, columns)
    if columns % 2 or rows % fmt.row_multiple:
        what = f"{where}: found blocks of {block} in a weight of {rows} x {columns}, which end within its last row"
        raise LayerError(found, stem, what)
    nested = tuple(f"{stem}.weight.{each}" for each in NESTED) if offset is not None else ()
    blocks = -(-rows * columns // block)
    if nested and any(
        name not in found.checkpoint or found.checkpoint[name].shape != (size,)
        for name, size in zip(nested, (-(-blocks // NESTED_BLOCK), NESTED_BLOCK), strict=True)
    ):
        what = f"{where}: found quantized absmax without {' and '.join(NESTED)} of its size, expected both"
        raise LayerError(found, stem, what, "missing-companion")
    spelling = Spelling(NAMES, {"weight": _Flat(), "weight_scale": _Absmax(offset)})
    return StoredLayer(stem, fmt, shape, spelling, unused=(mark, *nested))


def _state(found: Found, stem: str, mark: str) -> tuple[str, int, tuple[int, int], float | None]:
    """Method, block, shape [out, in], and the offset of nested scales or None."""
    try:
        assert found.checkpoint[mark].nbytes <= MAX_STATE_BYTES, "no JSON of bitsandbytes is as long"
        state = json.loads(found.checkpoint.read(mark).numpy().tobytes())
        rows, columns = state["shape"]
        offset = float(state["nested_offset"]) if "nested_blocksize" in state else None
        method, block = str(state["quant_type"]), int(state["blocksize"])
        is_sound = min(rows, columns, block) > 0 and state.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
    except (AssertionError, ValueError, KeyError, TypeError, RecursionError):
        is_sound = False
    if not is_sound:
        what = f"layer '{stem}': found no JSON of a matrix in '{mark}', expected quant_type, blocksize and shape"
        raise LayerError(found, stem, what, "bad-mark")
    return method, block, (rows, columns), offset


BITSANDBYTES = BitsAndBytes()
