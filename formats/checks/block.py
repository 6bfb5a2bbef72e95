"""Checks the config block of a component, and has its dialect check the rest of what it declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from omni_convert.formats.checks.reading import TolerantReading
from omni_convert.formats.checks.unlisted import check_unlisted
from omni_convert.formats.dialects.block_findings import FIX_BLOCK
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.dialects.vllm_omni import missing_flag, serialized_flag
from omni_convert.formats.finding import Finding

__all__ = ["check_block"]


def check_block(
    reading: TolerantReading,
    config: Mapping[str, Any],
    names: Mapping[str, str] = MappingProxyType({}),
    *,
    has_stage: bool = False,
) -> Iterator[Finding]:
    """Everything that is wrong with what is declared about a component.

    Args:
        config: its config.json; {} if there is none
        names: see `unlisted_linears`
        has_stage: it is a repository of which vLLM-Omni builds one stage quantized
    """
    dialect = None if reading.quantized.dialect is None else DIALECTS[reading.quantized.dialect]
    if dialect is None or dialect.declared_by != "block":
        yield from _unexplained_block(reading, config, is_bare=dialect is None or dialect.declared_by == "nothing")
    if dialect is not None:
        stored = {stem: layer.stored for stem, layer in reading.quantized.layers.items()}
        yield from dialect.check(reading.found, stored, config)
        is_of_diffusers = dialect.fills_vllm_omni_parameters and "_class_name" in config
        if not is_of_diffusers and not has_stage:  # of these, `check_scope` knows what vLLM-Omni builds
            yield from check_unlisted(reading.quantized, names)


def _unexplained_block(reading: TolerantReading, config: Mapping[str, Any], *, is_bare: bool) -> Iterator[Finding]:
    """A block that is not the dialect's, or none where nothing else declares the layers.

    Args:
        is_bare: only the tensors show that layers are quantized
    """
    block, layers = reading.found.block, reading.quantized.layers
    method = reading.found.quant_method
    if serialized_flag(method):
        yield missing_flag(method)
    elif block and is_bare:
        yield Finding(
            "error" if layers else "warning", "unknown-method", "",
            f"found quant_method {method[:40]!r}, which none of the dialects here has",
            "every runtime but its owner", FIX_BLOCK,
        )  # fmt: skip
    elif is_bare and "_class_name" in config and layers:
        yield Finding(
            "error", "no-block", "", "found quantized layers, but no quantization_config beside them",
            "vLLM-Omni, diffusers: take codes for weights", "convert with -m keep --dialect vllm-omni",
        )  # fmt: skip
