"""The config block of ModelOpt's exports, and what it means.

Flat    {"quant_method": "modelopt", "quant_algo": ALGORITHM, "config_groups": {...}, "ignore": [...], "producer": ...}
Nested  {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": ALGORITHM, "exclude_modules": [...]}}

FP8                        `fp8` with static activations
FP8_PER_CHANNEL_PER_TOKEN  `fp8`, a scale for each row, activations per token
NVFP4                      `nvfp4`; weight-only where no group has input activations
MIXED_PRECISION            "quantized_layers": {NAME: {"quant_algo": ...}}, of these, of W4A16_NVFP4 and of MXFP8
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from omni_convert.formats.config import MIXED, QuantizationConfig
from omni_convert.formats.errors import CheckpointError, RecipeError

__all__ = [
    "MIXED_PRECISION",
    "MODELOPT",
    "algorithm_of",
    "as_whole_name",
    "from_export",
    "from_modelopt",
    "is_export",
    "read_names",
    "shown",
    "spell_algorithms",
    "to_modelopt",
]

MODELOPT = "modelopt"
MIXED_PRECISION = "MIXED_PRECISION"
# Values of `quant_method` or `method`, normalised.
METHODS = (MODELOPT, "modelopt_fp4", "modelopt_mixed")
LOADED = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", MIXED_PRECISION)
REMEDY = f"expected one of {', '.join(LOADED)}; `omni-convert MODEL -m keep --dialect vllm-omni` re-encodes it"
NVFP4_GROUP_SIZE = 16
GROUP_SIZES = {"NVFP4": NVFP4_GROUP_SIZE, "W4A16_NVFP4": NVFP4_GROUP_SIZE, "MXFP8": 32}
# Algorithms for which its exporter writes config_groups even if all layers are alike.
WITH_GROUPS = ("FP8", "NVFP4", "W4A16_NVFP4")
# vLLM-Omni knows names with this prefix in mixtures only; elsewhere it reads NVFP4 without input activations so.
WEIGHT_ONLY = "W4A16_"

#: ModelOpt's name of an algorithm → what it means.
ALGORITHMS = {
    "FP8": QuantizationConfig("fp8", "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": QuantizationConfig("fp8", per_channel=True),
    "NVFP4": QuantizationConfig("nvfp4", "static"),
    "W4A16_NVFP4": QuantizationConfig("nvfp4", "none"),
    "MXFP8": QuantizationConfig("mxfp8"),
}


def shown(value: Any) -> str:
    """A value of unknown size and kind, on one short line."""
    short = reprlib.Repr()
    short.maxstring, short.maxlevel = 64, 2
    return short.repr(value)


def read_names(value: Any, key: str, where: str) -> tuple[str, ...]:
    """Names of layers in a block.

    Raises:
        CheckpointError: not a list of names.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: found {key} {shown(value)}, expected a list of layer names")
    for name in value:
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{where}: found {shown(name)} in {key}, expected layer names")
    return tuple(value)


def as_whole_name(name: str) -> str:
    """A pattern that matches this name alone; a name that is already a pattern is returned as it is.

    ModelOpt's reader also matches a plain entry with parts of names, so that `transformer_blocks.1.attn.to_q` would
    also exclude `single_transformer_blocks.1.attn.to_qkv_mlp_proj`. A pattern is matched as a whole.
    """
    return name if any(character in name for character in "*?[") else f"{name[:-1]}[{name[-1]}]"


def _as_plain_name(pattern: str) -> str:
    """The inverse of `as_whole_name`; other patterns stay as they are."""
    plain = pattern[:-3] + pattern[-2:-1]
    return plain if plain and as_whole_name(plain) == pattern else pattern


def to_modelopt(config: QuantizationConfig) -> dict[str, Any]:
    """The block of a configuration.

    Raises:
        RecipeError: ModelOpt has no name for the method, or for one of a mixture.
    """
    if config.method == MIXED:
        algorithms = {name: _name_of(layer) for name, layer in config.layers}
        return spell_algorithms(algorithms, config.ignored_layers, is_mixed=True)
    return spell_algorithms({"": _name_of(config)}, config.ignored_layers, is_mixed=False)


def _name_of(config: QuantizationConfig) -> str:
    plain = replace(config, ignored_layers=())
    for name, known in ALGORITHMS.items():
        if known == plain:
            return name
    raise RecipeError(f"quantized_layers: found {config.method}, expected one of {', '.join(ALGORITHMS)}")


def spell_algorithms(algorithms: Mapping[str, str], ignored: Collection[str], *, is_mixed: bool) -> dict[str, Any]:
    """The block of these layers.

    Args:
        algorithms: name of each quantized layer to its algorithm; the names matter only with `is_mixed`
        ignored: layers that are not quantized
        is_mixed: whether to list the layers
    """
    kinds = sorted(set(algorithms.values()))
    targets = {kind: [name for name in sorted(algorithms) if algorithms[name] == kind] for kind in kinds}
    groups = {
        f"group_{number}": _group(kind, targets[kind] if is_mixed else ["Linear"]) for number, kind in enumerate(kinds)
    }
    block: dict[str, Any] = {
        "quant_method": MODELOPT,
        "quant_algo": MIXED_PRECISION if is_mixed else kinds[0].removeprefix(WEIGHT_ONLY),
        **({"config_groups": groups} if is_mixed or kinds[0] in WITH_GROUPS else {}),
        "ignore": [as_whole_name(name) for name in sorted(set(ignored))],
        "producer": {"name": "omni-convert"},
    }
    if is_mixed:
        block["quantized_layers"] = {name: _described(kind) for name, kind in sorted(algorithms.items())}
    return block


def _described(algorithm: str) -> dict[str, Any]:
    described: dict[str, Any] = {"quant_algo": algorithm}
    return described | {"group_size": GROUP_SIZES[algorithm]} if algorithm in GROUP_SIZES else described


def _group(algorithm: str, targets: list[str]) -> dict[str, Any]:
    """An entry of config_groups as its exporter writes it: nothing tells which activations are dynamic."""
    weights: dict[str, Any] = {"dynamic": False, "num_bits": 4 if "NVFP4" in algorithm else 8, "type": "float"}
    if algorithm in GROUP_SIZES:
        weights["group_size"] = GROUP_SIZES[algorithm]
    inputs = None if algorithm.startswith(WEIGHT_ONLY) else dict(weights)
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        weights["strategy"] = "channel"
    return {"input_activations": inputs, "weights": weights, "targets": targets}


def from_modelopt(block: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Reads a block in the newer shape; unknown keys are allowed, as in ModelOpt's own reader.

    Raises:
        CheckpointError: another algorithm, or what belongs to it is missing.
    """
    ignored = tuple(_as_plain_name(name) for name in read_names(block.get("ignore"), "ignore", where))
    algorithm = block.get("quant_algo")
    if algorithm == MIXED_PRECISION:
        return QuantizationConfig(MIXED, ignored_layers=ignored, layers=_listed(block.get("quantized_layers"), where))
    if algorithm == "FP8":
        return QuantizationConfig("fp8", "static", ignored_layers=ignored)
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return QuantizationConfig("fp8", ignored_layers=ignored, per_channel=True)
    if algorithm != "NVFP4":
        expected = f"'FP8', 'FP8_PER_CHANNEL_PER_TOKEN', 'NVFP4' or '{MIXED_PRECISION}'"
        raise CheckpointError(f"{where}: found quant_algo {shown(algorithm)}, expected {expected}")
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(each, Mapping) for each in groups.values()):
        raise CheckpointError(f"{where}: found config_groups {shown(groups)}, expected an object of objects")
    for group in groups.values():
        _check_nvfp4_weights(group.get("weights"), where)
    # The runtime runs weight-only GEMMs if no group has input activations.
    is_weight_only = all(group.get("input_activations") is None for group in groups.values())
    return QuantizationConfig("nvfp4", "none" if is_weight_only else "static", ignored_layers=ignored)


def is_export(block: Mapping[str, Any]) -> bool:
    """Whether vLLM-Omni reads a mapping as ModelOpt's: by its method or producer, unless the algorithm is unknown."""
    method, producer = block.get("method", block.get("quant_method")), block.get("producer")
    name = producer.get("name") if isinstance(producer, Mapping) else None
    is_named = isinstance(method, str) and method.lower().replace("-", "_") in METHODS
    if not is_named and not (isinstance(name, str) and name.lower() == MODELOPT):
        return False
    algorithm = algorithm_of(block)
    return algorithm in LOADED if algorithm else is_named


def algorithm_of(block: Mapping[str, Any]) -> str:
    """`quant_algo` in capitals, from the nested mapping if there is one; empty if the block has none."""
    nested = block.get("quantization")
    algorithm = (nested if isinstance(nested, Mapping) else block).get("quant_algo")
    return str(algorithm).upper() if algorithm else ""


def from_export(block: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Reads a block of either shape, with `quant_algo` in any case.

    Raises:
        CheckpointError: the block has no algorithm, or one that is not loaded.
    """
    algorithm = algorithm_of(block)
    if not algorithm:
        raise CheckpointError(f"{where}: found ModelOpt's block with a missing quant_algo, {REMEDY}")
    if algorithm not in LOADED:
        raise CheckpointError(f"{where}: found quant_algo {algorithm[:64]!r}, {REMEDY}")
    nested = block.get("quantization")
    if algorithm == "FP8" or (algorithm == "NVFP4" and isinstance(nested, Mapping)):
        # Ignored names are patterns here, so the tensors decide which layers are quantized.
        return QuantizationConfig("nvfp4" if algorithm == "NVFP4" else "fp8", activation_scheme="static")
    if isinstance(nested, Mapping):
        block = {"ignore": nested.get("exclude_modules"), "quantized_layers": nested.get("quantized_layers")}
    return from_modelopt({**block, "quant_algo": algorithm}, where)


def _listed(layers: Any, where: str) -> tuple[tuple[str, QuantizationConfig], ...]:
    if not isinstance(layers, Mapping) or not layers:
        raise CheckpointError(
            f"{where}: found quantized_layers {shown(layers)}, expected an object of layers, as "
            '{"blocks.0.attn.to_q": {"quant_algo": "MXFP8"}}'
        )
    return tuple((_layer_name(name, where), _of_entry(name, entry, where)) for name, entry in layers.items())


def _layer_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{where}: found {shown(name)} in quantized_layers, expected layer names")
    return name


def _of_entry(name: str, entry: Any, where: str) -> QuantizationConfig:
    algorithm = entry.get("quant_algo") if isinstance(entry, Mapping) else None
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise CheckpointError(
            f"{where}: found quant_algo {shown(algorithm)} of {shown(name)} in quantized_layers, expected one of "
            f"{', '.join(ALGORITHMS)}"
        )
    expected = GROUP_SIZES.get(algorithm)
    if expected is not None and entry.get("group_size", expected) != expected:
        found = shown(entry["group_size"])
        raise CheckpointError(
            f"{where}: found group_size {found} of {shown(name)} in quantized_layers, expected {expected}"
        )
    return ALGORITHMS[algorithm]


def _check_nvfp4_weights(weights: Any, where: str) -> None:
    expected = {"num_bits": 4, "type": "float", "group_size": NVFP4_GROUP_SIZE}
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}: found weights {shown(weights)} in config_groups, expected an object")
    for key, value in expected.items():
        if weights.get(key, value) != value:
            raise CheckpointError(
                f"{where}: found {key} {shown(weights[key])} in config_groups, expected {value!r} for NVFP4"
            )
