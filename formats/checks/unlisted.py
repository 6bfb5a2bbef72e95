"""Linears that are stored unquantized although the config block says that they are quantized."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import counted
from omni_convert.formats.finding import Finding
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["check_unlisted", "shown_unlisted", "unlisted_linears"]

# A weight in a numbered block, or the head of a language model; elsewhere, names do not tell linears from embeddings.
LINEAR = re.compile(r".+\.\d+\..+|(.+\.)?lm_head")
# Matrices that are no linears of their class, or that quantizers leave alone without being told.
NO_LINEAR = re.compile(r"emb|norm|bias|router|(^|\.)gate$|conv|patch|relative|rotary|table")


def unlisted_linears(quantized: QuantizedCheckpoint) -> list[str]:
    """Stems of these linears, in checkpoint order; none if nothing in the component is quantized."""
    if quantized.dialect is None or not quantized.layers:
        return []
    dialect = DIALECTS[quantized.dialect]
    stems = (
        name.removesuffix(WEIGHT)
        for name, stored in quantized.kept.items()
        if name.endswith(WEIGHT)
        and len(quantized.checkpoint[stored].shape) == 2
        and quantized.checkpoint[stored].dtype.itemsize > 1
    )
    linears = (stem for stem in stems if LINEAR.fullmatch(stem) and not NO_LINEAR.search(stem))
    return [stem for stem in linears if dialect.declares_quantized(quantized.block, stem)]


def check_unlisted(quantized: QuantizedCheckpoint) -> Iterator[Finding]:
    """One finding about all of them."""
    stems = unlisted_linears(quantized)
    if stems and quantized.dialect is not None:
        yield Finding(
            "error", "not-ignored", stems[0], f"found {shown_unlisted(stems)}",
            f"{DIALECTS[quantized.dialect].consumers}: takes its numbers for codes, and misses its scale: garbage",
            "list it as ignored in quantization_config, under the name that it has in the model",
        )  # fmt: skip


def shown_unlisted(stems: list[str]) -> str:
    """These linears, as part of a message."""
    more = f" and {counted(len(stems) - 1, 'other layer')}" if len(stems) > 1 else ""
    return f"'{stems[0]}'{more} unquantized, but the config block says quantized"
