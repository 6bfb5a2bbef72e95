"""Linears that are stored unquantized although the config block says that they are quantized."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import counted
from omni_convert.formats.finding import Finding
from omni_convert.formats.views.opened import QuantizedCheckpoint

__all__ = ["check_unlisted", "shown_unlisted", "unlisted_linears"]

# A weight in a numbered block, or the head of a language model; elsewhere, names do not tell linears from embeddings.
LINEAR = re.compile(r".+\.\d+\..+|(.+\.)?lm_head")
# Matrices that are no linears of their class, or that quantizers leave alone without being told.
NO_LINEAR = re.compile(r"emb|norm|bias|router|(^|\.)gate$|conv|patch|relative|rotary|table")


def unlisted_linears(quantized: QuantizedCheckpoint, names: Mapping[str, str]) -> list[str]:
    """Stems of these linears, in checkpoint order; none if nothing in the component is quantized.

    Args:
        names: a tensor's name in the file to that in the model, by which readers look it up; where they differ
    """
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
    return [stem for stem in linears if _is_declared(stem, dialect, quantized.block, names)]


def _is_declared(stem: str, dialect: Dialect, block: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    is_declared = dialect.declares_quantized(block, _in_model(stem, names))
    return is_declared and (dialect.looks_up_model_names or dialect.declares_quantized(block, stem))


def _in_model(stem: str, names: Mapping[str, str]) -> str:
    return names.get(f"{stem}{WEIGHT}", stem).removesuffix(WEIGHT)


def check_unlisted(quantized: QuantizedCheckpoint, names: Mapping[str, str]) -> Iterator[Finding]:
    """One finding about all of them; for `names` see `unlisted_linears`."""
    stems = unlisted_linears(quantized, names)
    if stems and quantized.dialect is not None:
        yield Finding(
            "error", "not-ignored", stems[0], f"found {shown_unlisted(stems)}",
            f"{DIALECTS[quantized.dialect].consumers}: takes its numbers for codes, and misses its scale: garbage",
            f"list it as ignored in quantization_config, as '{_in_model(stems[0], names)}'",
        )  # fmt: skip


def shown_unlisted(stems: list[str]) -> str:
    """These linears, as part of a message."""
    more = f" and {counted(len(stems) - 1, 'other layer')}" if len(stems) > 1 else ""
    return f"'{stems[0]}'{more} unquantized, but the config block says quantized"
