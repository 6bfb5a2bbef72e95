"""Checks the config block of a repository with stages, of which vLLM-Omni builds one quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omni_convert.formats.checks.reading import TolerantReading
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.families.stage import BLOCK, Fp8Refusal, Stage
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import FP8_PER_ROW, fp8_block_size

__all__ = ["check_stage", "fp8_refusal", "stage_refusal"]

CONSUMER = "vLLM-Omni"


def check_stage(reading: TolerantReading, stage: Stage, config: Mapping[str, Any]) -> Iterator[Finding]:
    """The block's place, and formats that the stage does not load.

    Args:
        config: config.json of the repository
    """
    assert reading.quantized.dialect is not None
    dialect = DIALECTS[reading.quantized.dialect]
    if (what := _misplaced(stage, config, dialect)) is not None:
        yield Finding(
            "error", "misplaced-block", "", what, f"{CONSUMER}: hands it to every stage, or to none",
            "convert the original with omni-convert, which knows the model",
        )  # fmt: skip
    refusal = fp8_refusal(stage, (layer.format for layer in reading.quantized.layers.values()))
    if refusal is not None:
        remedy = f"convert the original; {refusal.remedy}"
        yield Finding("error", "unsupported-family", "", refusal.reason, CONSUMER, remedy)


def stage_refusal(stage: Stage, config: Mapping[str, Any], dialect: Dialect, formats: Iterable[Format]) -> str | None:
    """Why vLLM-Omni misreads the stage, or None; see `check_stage`."""
    refusal = fp8_refusal(stage, formats)
    return _misplaced(stage, config, dialect) or (refusal.reason if refusal is not None else None)


def fp8_refusal(stage: Stage, formats: Iterable[Format]) -> Fp8Refusal | None:
    """Why the stage does not load one of these formats, or None."""
    for fmt in formats:
        scales = "block" if fp8_block_size(fmt) is not None else "row" if fmt.encoding == FP8_PER_ROW else ""
        for refusal in stage.fp8_refusals:
            if scales in refusal.scales:
                return refusal
    return None


def _misplaced(stage: Stage, config: Mapping[str, Any], dialect: Dialect) -> str | None:
    block = config.get(BLOCK)
    if dialect.names_quantized_blocks:
        named = block.get("block_name_to_quantize") if isinstance(block, Mapping) else None
        names = named.split(",") if isinstance(named, str) else named if isinstance(named, list) else []
        if any(str(name).strip().startswith(stage.prefix) for name in names):
            return None
        return f"found block_name_to_quantize {str(named)[:64]!r}, expected names that begin with '{stage.prefix}'"
    if not stage.config_path:
        return None
    place = ".".join((*stage.config_path, BLOCK))
    if block:
        return f"found {BLOCK} at the top level of config.json, expected it in {place}"
    return None if stage.block_of(config) else f"found no {place} in config.json, expected the block there"
