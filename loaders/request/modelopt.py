"""What ModelOpt writes about a checkpoint, in either of its shapes, and what of it our loader runs.

Flat    {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": [...], ...}
Nested  {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": [...]}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects.modelopt_config import from_modelopt
from omni_convert.formats.errors import CheckpointError

__all__ = ["is_modelopt", "modelopt_algorithm", "read_modelopt"]

METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
DETECTED = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")
REMEDY = f"expected one of {', '.join(DETECTED)}; `omni-convert MODEL -m keep --dialect vllm-omni` spells it anew"


def is_modelopt(spec: Mapping[str, Any]) -> bool:
    """Whether vLLM-Omni takes a mapping for ModelOpt's: by its method or producer, unless the algorithm is unknown."""
    method = spec.get("method", spec.get("quant_method"))
    producer = spec.get("producer")
    name = producer.get("name") if isinstance(producer, Mapping) else None
    is_named = isinstance(method, str) and method.lower().replace("-", "_") in METHODS
    if not is_named and not (isinstance(name, str) and name.lower() == METHODS[0]):
        return False
    algorithm = modelopt_algorithm(spec)
    return algorithm in DETECTED if algorithm else is_named


def modelopt_algorithm(spec: Mapping[str, Any]) -> str:
    """`quant_algo` in capitals, of the nested mapping where there is one; nothing where it is not said."""
    nested = spec.get("quantization")
    algorithm = (nested if isinstance(nested, Mapping) else spec).get("quant_algo")
    return str(algorithm).upper() if algorithm else ""


def read_modelopt(spec: Mapping[str, Any], where: str) -> QuantizationConfig:
    """What a mapping that `is_modelopt` means.

    Raises:
        CheckpointError: no algorithm, or one that is not loaded.
    """
    algorithm = modelopt_algorithm(spec)
    if not algorithm:
        raise CheckpointError(f"{where}: found ModelOpt's block with a missing quant_algo, {REMEDY}")
    if algorithm not in DETECTED:
        raise CheckpointError(f"{where}: found quant_algo {algorithm[:64]!r}, {REMEDY}")
    nested = spec.get("quantization")
    if algorithm == "FP8" or (algorithm == "NVFP4" and isinstance(nested, Mapping)):
        # The names are patterns; which layers are quantized, the tensors decide.
        return QuantizationConfig("nvfp4" if algorithm == "NVFP4" else "fp8", activation_scheme="static")
    if isinstance(nested, Mapping):
        spec = {"ignore": nested.get("exclude_modules"), "quantized_layers": nested.get("quantized_layers")}
    return from_modelopt({**spec, "quant_algo": algorithm}, where)
