"""Our own spelling of the config block, for components that transformers loads (text encoders).

transformers owns `fp8`, `mxfp8`, `mxfp4` and `nvfp4` as values of `quant_method`; a text encoder therefore has

    {"quant_method": "omni_convert", "method": "fp8", ...the other keys as vLLM-Omni spells them...}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects import vllm_omni
from omni_convert.formats.errors import CheckpointError

__all__ = ["QUANT_METHOD", "from_block", "to_block"]

QUANT_METHOD = vllm_omni.WRAPPED


def to_block(config: QuantizationConfig) -> dict[str, Any]:
    """The block for a text encoder's config.json."""
    return vllm_omni.wrapped(vllm_omni.to_block(config))


def from_block(block: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Reads a block that `to_block` wrote.

    Raises:
        CheckpointError: not such a block, or one that vLLM-Omni's spelling does not allow.
    """
    if block.get("quant_method") != QUANT_METHOD or "method" not in block:
        raise CheckpointError(f"{where}: found quant_method {block.get('quant_method')!r}, expected '{QUANT_METHOD}'")
    rest = {key: value for key, value in block.items() if key not in ("quant_method", "method")}
    return vllm_omni.from_block({"quant_method": block["method"], **rest}, where)
