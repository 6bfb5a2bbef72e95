"""Reads `quantization_config` of a component's config.json, in every dialect that our loader runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects import (
    auto_round,
    bitsandbytes,
    modelopt_config,
    nunchaku,
    nunchaku_lite,
    omni_convert,
    svdquant,
    vllm_omni,
)

__all__ = ["read_block", "read_claimed_block"]

WHERE = "quantization_config"


def read_claimed_block(block: Any, where: str = WHERE) -> QuantizationConfig | None:
    """Reads a block that our loader claims although the library has another quantizer under its `quant_method`.

    These are exported ModelOpt checkpoints, W4A16 in AutoRound's packing, and NF4 of bitsandbytes.

    Returns:
        None for any other block

    Raises:
        CheckpointError: the block has a `quant_algo` that is not loaded, or lacks what belongs to it.
    """
    if isinstance(block, Mapping) and block.get("quant_method") == modelopt_config.MODELOPT:
        return modelopt_config.from_export(block, where) if modelopt_config.algorithm_of(block) else None
    readers = (auto_round, bitsandbytes, svdquant, nunchaku, nunchaku_lite)
    return next(filter(None, (reader.from_block(block) for reader in readers)), None)


def read_block(block: Any, where: str = WHERE) -> QuantizationConfig:
    """Reads a block.

    Raises:
        CheckpointError: the block is not an object, or has an unknown method or key.
    """
    if (claimed := read_claimed_block(block, where)) is not None:
        return claimed
    if isinstance(block, Mapping) and block.get("quant_method") == omni_convert.QUANT_METHOD:
        return omni_convert.from_block(block, where)
    return vllm_omni.from_block(block, where)
