"""What a quantized checkpoint lacks or has too much, as far as names tell; no weight is read and no model built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from omni_convert.formats.checkpoint import Checkpoint
from omni_convert.formats.dialects.gguf import GGUF
from omni_convert.formats.leaf import CODES, COMPANIONS, LOW_BIT, WEIGHT
from omni_convert.formats.quantized import QuantizedCheckpoint
from omni_convert.formats.siblings import Gap, gaps
from omni_convert.formats.tensor_spec import DTYPE_NAMES

__all__ = ["Flaw", "block_gaps", "incomplete", "without_weight"]

# Whose readers take no tensor that they do not know.
STRICT = ("vllm-omni", "modelopt")
LEAVES_SHOWN = 5


@dataclass(frozen=True)
class Flaw:
    """What is missing, or without a use.

    Attributes:
        is_scale: it is the scale of codes, which vLLM-Omni leaves unset with a warning
    """

    reason: str
    is_scale: bool = False


def block_gaps(quantized: QuantizedCheckpoint, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Gap]:
    """Tensors that a block lacks, and its siblings have.

    Args:
        shapes: stem to [out, in] of the quantized layers, those that cannot be read included
    """
    if quantized.dialect == GGUF.name:
        return
    codes = {f"{stem}{WEIGHT}": shape for stem, shape in shapes.items()}
    kept = {
        name: quantized.checkpoint[stored].shape
        for name, stored in quantized.kept.items()
        if name.rpartition(".")[2] not in COMPANIONS and name not in codes
    }
    yield from gaps({**codes, **kept}, codes)


def without_weight(checkpoint: Checkpoint, stem: str) -> str | None:
    """What is there of a layer that has no weight: its companions, and names that may be the weight's; else None."""
    leaves = [name.removeprefix(f"{stem}.") for name in checkpoint if name.rpartition(".")[0] == stem]
    if any(leaf in CODES for leaf in leaves):
        return None
    shown = [leaf for leaf in leaves if leaf != "bias"]
    more = f" and {len(shown) - LEAVES_SHOWN} more" if len(shown) > LEAVES_SHOWN else ""
    return f"found {', '.join(shown[:LEAVES_SHOWN])}{more} without a weight"


def incomplete(quantized: QuantizedCheckpoint) -> Flaw | None:
    """The first of these; None if names tell nothing."""
    if quantized.dialect in (None, GGUF.name):
        return None
    shapes = {stem: layer.shape for stem, layer in quantized.layers.items()}
    gap = next(block_gaps(quantized, shapes), None)
    if gap is not None:
        return Flaw(gap.reason)
    return next(filter(None, (_stray(quantized, name) for name in quantized.kept.values())), None)


def _stray(quantized: QuantizedCheckpoint, name: str) -> Flaw | None:
    """What is wrong with a tensor that belongs to no quantized layer."""
    stem, _, leaf = name.rpartition(".")
    spec = quantized.checkpoint[name]
    if leaf in COMPANIONS:
        bare = without_weight(quantized.checkpoint, stem)
        if bare is not None:
            return Flaw(f"layer '{stem}': {bare}")
        what = f"found '{name}', which belongs to no quantized layer"
        return Flaw(what) if quantized.dialect in STRICT else None
    if quantized.dialect in STRICT and leaf in CODES and spec.dtype in LOW_BIT and len(spec.shape) == 2:
        return Flaw(f"found '{name}' in {DTYPE_NAMES[spec.dtype]} without the scales that it needs", is_scale=True)
    return None
