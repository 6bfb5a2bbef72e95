"""How bitsandbytes serializes a component: tables of 16 numbers, and LLM.int8, which is only read.

Tensors:  NAME.weight                                U8 [out * in / 2, 1], even element in the high nibble
          NAME.weight.absmax                         F32 [blocks], or U8 where it is quantized itself (nested):
          NAME.weight.nested_absmax                  F32 [blocks / 256]
          NAME.weight.nested_quant_map               F32 [256]; absmax = map[code] * nested_absmax + nested_offset
          NAME.weight.quant_map                      F32 [16]
          NAME.weight.quant_state.bitsandbytes__nf4  U8, JSON: quant_type, blocksize, shape, nested_offset; or __fp4
          INT8: NAME.weight I8 [out, in], NAME.SCB F32 [out], NAME.weight_format; W = code * SCB / 127
Block:    {"quant_method": "bitsandbytes", "load_in_4bit": true, "llm_int8_skip_modules": [...], ...}
Readers:  take every linear for quantized that `llm_int8_skip_modules` does not name, and look for all tensors of a
          layer in the file of its weight: a layer is never spread over shards.
Limits:   a weight in which a block ends within the last row is not read; none with blocks that cross rows is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import (
    Dialect,
    Found,
    JudgedComponent,
    LayerError,
    Spelling,
    StoredLayer,
    WrittenSpelling,
    attempt,
)
from omni_convert.formats.dialects.codec import Codec, WritableCodec
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, REQUANTIZE, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.schemes.foreign import Scaled
from omni_convert.formats.schemes.nf4 import NESTED_BLOCK, Codebook, Nf4

__all__ = ["BITSANDBYTES", "from_block"]

STATE = "quant_state.bitsandbytes__"
NAMES = {
    "weight_scale": "weight.absmax",
    "absmax": "weight.absmax",
    "absmax_scale": "weight.nested_absmax",
    "absmax_table": "weight.nested_quant_map",
    "table": "weight.quant_map",
}
NESTED = ("nested_absmax", "nested_quant_map")
LARGEST_INT8 = 127.0
MAX_STATE_BYTES = 4096
# Characters for the offset of nested scales, so that the JSON has its size before its number is known.
OFFSET_WIDTH = 26
SKIPPED = "llm_int8_skip_modules"


@dataclass(frozen=True)
class _Flat(WritableCodec):
    """Rows of the weight in a column of bytes."""

    is_turned = True

    def stored(self, layout: TensorLayout) -> TensorLayout:
        rows, columns = layout.shape
        return TensorLayout(layout.dtype, (rows * columns, 1), entries=columns)

    def encode(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, 1)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return stored.view(-1, layout.shape[1])

    def read(self, checkpoint: Checkpoint, name: str, layout: TensorLayout, start: int, stop: int) -> Tensor:
        columns = layout.shape[1]
        return self.decode(checkpoint.read_rows(name, start * columns, stop * columns), layout)


@dataclass(frozen=True)
class _State(WritableCodec):
    """The JSON of a layer with nested scales, whose offset is a number of the format.

    Attributes:
        facts: what the JSON says before the offset
    """

    facts: str = ""

    def stored(self, layout: TensorLayout) -> TensorLayout:
        return TensorLayout(torch.uint8, (len(self._text(0.0)),), 0)

    def mismatch(self, spec: TensorSpec, layout: TensorLayout) -> str | None:
        return None if spec.dtype is torch.uint8 else "U8"

    def encode(self, tensor: Tensor) -> Tensor:
        return torch.tensor(list(self._text(float(tensor))), dtype=torch.uint8)

    def decode(self, stored: Tensor, layout: TensorLayout) -> Tensor:
        return torch.tensor(json.loads(stored.numpy().tobytes())["nested_offset"], dtype=torch.float32)

    def _text(self, offset: float) -> bytes:
        return (self.facts + f"{offset!r}}}".ljust(OFFSET_WIDTH)).encode()


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
    runtimes = ("diffusers",)
    keeps_layers_whole = True
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "quantizes with bitsandbytes online only, and knows no key of its block"),
        Verdict(DIFFUSERS, "loads", "with bitsandbytes installed, on a GPU; so does transformers"),
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

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if not isinstance(fmt, Codebook):
            return f"bitsandbytes' files are written for nf4, found {fmt.label}"
        if shape[1] % fmt.block:
            return f"bitsandbytes misreads blocks of {fmt.block} that cross rows of {shape[1]} on a CPU"
        facts = {"quant_type": fmt.method, "blocksize": fmt.block, "dtype": fmt.dtype, "shape": [*shape]}
        mark = f"weight.{STATE}{fmt.method}"
        if not fmt.nested:
            return WrittenSpelling(NAMES, {"weight": _Flat()}, extras={mark: json.dumps(facts).encode()})
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        text = json.dumps(facts).removesuffix("}") + ', "nested_offset": '
        return WrittenSpelling({**NAMES, "absmax_offset": mark}, {"weight": _Flat(), "absmax_offset": _State(text)})

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block that diffusers and transformers write.

        Raises:
            RecipeError: readers would skip a quantized layer, since its name is that of a kept one, or the formats
                are more than the block can tell.
        """
        kinds = {(fmt.method, getattr(fmt, "nested", False), getattr(fmt, "dtype", "")) for fmt in layers.values()}
        if len(kinds) != 1:
            found = ", ".join(sorted({fmt.label for fmt in layers.values()}))
            raise RecipeError(f"found layers of {found}, expected one format")
        ((method, nested, dtype),) = kinds
        skipped = sorted({*ignored} - layers.keys())
        covered = next(((stem, name) for stem in layers for name in skipped if self.is_covered(stem, name)), None)
        if covered is not None:
            stem, name = covered
            raise RecipeError(
                f"'{stem}': found it quantized and '{name}' not, expected both or neither: bitsandbytes' readers leave "
                "each layer alone whose name ends in that of a skipped one"
            )
        return {
            "quant_method": self.name,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": method,
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            SKIPPED: skipped,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        is_ours = all(fmt.method == Nf4.method for fmt in component.layers.values())
        ours = Verdict(OURS, "loads", "NF4 of models of diffusers, on any device") if is_ours else REQUANTIZE
        return [*self.usual_verdicts, ours]

    def ignored_entries(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        listed = block.get(SKIPPED)
        return tuple(map(str, listed)) if isinstance(listed, list) else ()

    def is_covered(self, name: str, kept: str) -> bool:
        """Both libraries leave the layers below a name alone; transformers also those whose names end in it.

        Diffusers compares the last part of a layer's name with the names, too.
        """
        return f"{kept}." in name or name.endswith(kept)

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        entries = self.ignored_entries(block) if isinstance(block.get(SKIPPED), list) else ("lm_head",)
        return bool(block) and not any(f".{entry}." in f".{stem}." for entry in entries)


def from_block(block: Any) -> QuantizationConfig | None:
    """Reads a block of NF4 layers; None for any other block."""
    is_nf4 = (
        isinstance(block, Mapping)
        and block.get("quant_method") == BitsAndBytes.name
        and block.get("load_in_4bit") is True
        and block.get("bnb_4bit_quant_type") == Nf4.method
    )
    if not is_nf4:
        return None
    return QuantizationConfig(Nf4.method, "none", ignored_layers=BITSANDBYTES.ignored_entries(block))


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
    fmt, shape = _state(found, stem, mark)
    rows, columns = shape
    if columns % 2 or rows * columns % fmt.block:
        what = f"{where}: found blocks of {fmt.block} in a weight of {rows} x {columns}, which end within its last row"
        raise LayerError(found, stem, what)
    blocks = rows * columns // fmt.block
    nested = [found.get(stem, f"weight.{each}") for each in NESTED] if fmt.nested else []
    sizes = (-(-blocks // NESTED_BLOCK), NESTED_BLOCK)
    if any(spec is None or spec.shape != (size,) for spec, size in zip(nested, sizes, strict=False)):
        what = f"{where}: found quantized absmax without {' and '.join(NESTED)} of its size, expected both"
        raise LayerError(found, stem, what, "missing-companion")
    if not fmt.nested:
        return StoredLayer(stem, fmt, shape, Spelling(NAMES, {"weight": _Flat()}), unused=(mark,))
    spelling = Spelling(NAMES, {"weight": _Flat(), "absmax_offset": _State()})
    return StoredLayer(stem, fmt, shape, spelling, places={"absmax_offset": mark})


def _state(found: Found, stem: str, mark: str) -> tuple[Codebook, tuple[int, int]]:
    """The format and the shape [out, in] of a layer."""
    try:
        assert found.checkpoint[mark].nbytes <= MAX_STATE_BYTES, "no JSON of bitsandbytes is as long"
        state = json.loads(found.checkpoint.read(mark).numpy().tobytes())
        rows, columns = state["shape"]
        is_nested = "nested_blocksize" in state
        is_nested_soundly = not is_nested or math.isfinite(float(state["nested_offset"]))
        method, block = str(state["quant_type"]), int(state["blocksize"])
        is_sound = min(rows, columns, block) > 0 and state.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
    except (AssertionError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        is_sound = is_nested_soundly = False
    if not (is_sound and is_nested_soundly):
        what = f"layer '{stem}': found no JSON of a matrix in '{mark}', expected quant_type, blocksize and shape"
        raise LayerError(found, stem, what, "bad-mark")
    facts: dict[str, Any] = {"block": block, "nested": is_nested, "dtype": str(state.get("dtype", "bfloat16"))[:20]}
    fmt = Nf4(**facts) if method == Nf4.method else Codebook(method, **facts)
    return fmt.for_columns(columns), (rows, columns)


BITSANDBYTES = BitsAndBytes()
