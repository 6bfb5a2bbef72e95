"""What AutoRound writes about a W4A16 checkpoint, and which of these our loader runs.

AutoRound's own loader has the others: AWQ's packing, other numbers of bits, some layers with other bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects.auto_round import AUTO_ROUND_METHODS, PACKING, WRITTEN_BITS
from omni_convert.formats.int4 import Int4

__all__ = ["read_auto_round"]

UNQUANTIZED_BITS = 16


def read_auto_round(block: Any) -> QuantizationConfig | None:
    """What a block means that describes W4A16 layers as we read them, all alike; None of any other."""
    if not isinstance(block, Mapping) or block.get("quant_method") not in AUTO_ROUND_METHODS:
        return None
    group, exceptions = block.get("group_size"), block.get("extra_config") or {}
    is_ours = (
        block.get("bits") == WRITTEN_BITS
        and block.get("data_type", "int") == "int"
        and block.get("packing_format", PACKING) == PACKING
        and type(group) is int
        and group > 0
        and isinstance(exceptions, Mapping)
        and all(_is_unquantized(each) for each in exceptions.values())
    )
    if not is_ours:
        return None
    return QuantizationConfig(Int4.method, "none", ignored_layers=tuple(map(str, exceptions)), group_size=group)


def _is_unquantized(exception: Any) -> bool:
    bits = exception.get("bits") if isinstance(exception, Mapping) else None
    return isinstance(bits, int) and bits >= UNQUANTIZED_BITS
