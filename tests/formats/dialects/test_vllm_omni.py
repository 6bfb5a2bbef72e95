"""Blocks as vLLM-Omni 0.30.0 takes them: the keys of its constructors, the flags, and the names that it compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

import pytest

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.vllm_omni import from_block, ignored_names, to_block
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.table import find_family

IGNORED = ("layers.0.attention.to_qkv", "layers.0.attention.to_k")
NAMES = sorted(IGNORED)
NVFP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}

CASES: dict[str, tuple[QuantizationConfig, dict[str, Any]]] = {
    "fp8": (
        QuantizationConfig("fp8", ignored_layers=IGNORED),
        {
            "quant_method": "fp8",
            "is_checkpoint_fp8_serialized": True,
            "activation_scheme": "dynamic",
            "ignored_layers": NAMES,
        },
    ),
    "fp8-static": (
        QuantizationConfig("fp8", "static"),
        {
            "quant_method": "fp8",
            "is_checkpoint_fp8_serialized": True,
            "activation_scheme": "static",
            "ignored_layers": [],
        },
    ),
    "fp8-block": (
        QuantizationConfig("fp8", weight_block_size=(128, 64)),
        {
            "quant_method": "fp8",
            "is_checkpoint_fp8_serialized": True,
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 64],
            "ignored_layers": [],
        },
    ),
    "int8": (
        QuantizationConfig("int8", ignored_layers=IGNORED),
        {
            "quant_method": "int8",
            "is_checkpoint_int8_serialized": True,
            "activation_scheme": "dynamic",
            "ignored_layers": NAMES,
        },
    ),
    "mxfp8": (
        QuantizationConfig("mxfp8", ignored_layers=IGNORED),
        {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True, "ignored_layers": NAMES},
    ),
    "mxfp4": (
        QuantizationConfig("mxfp4", require_smooth_scale=True),
        {
            "quant_method": "mxfp4",
            "is_checkpoint_mxfp4_serialized": True,
            "require_smooth_scale": True,
            "ignored_layers": [],
        },
    ),
    "mxfp4_dualscale": (
        QuantizationConfig("mxfp4_dualscale", ignored_layers=IGNORED),
        {"quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": True, "ignored_layers": NAMES},
    ),
    "nvfp4": (
        QuantizationConfig("nvfp4", "static", ignored_layers=IGNORED),
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": {"group_0": {"input_activations": NVFP4, "weights": NVFP4, "targets": ["Linear"]}},
            "ignore": ["layers.0.attention.to_[k]", "layers.0.attention.to_qk[v]"],
            "producer": {"name": "omni-convert"},
        },
    ),
    "nvfp4-weights-only": (
        QuantizationConfig("nvfp4", "none"),
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": {"group_0": {"input_activations": None, "weights": NVFP4, "targets": ["Linear"]}},
            "ignore": [],
            "producer": {"name": "omni-convert"},
        },
    ),
}


@pytest.mark.parametrize(("config", "block"), CASES.values(), ids=CASES)
def test_block_holds_exactly_the_keys_of_the_runtime(config: QuantizationConfig, block: dict[str, Any]) -> None:
    assert to_block(config) == block


@pytest.mark.parametrize(("config", "block"), CASES.values(), ids=CASES)
def test_block_is_read_back(config: QuantizationConfig, block: dict[str, Any]) -> None:
    read = from_block(block, "config.json")
    assert set(read.ignored_layers) == set(config.ignored_layers)
    assert to_block(read) == block


FP8 = CASES["fp8"][1]
INT8 = CASES["int8"][1]
MXFP4 = CASES["mxfp4"][1]
DUAL = CASES["mxfp4_dualscale"][1]
MODELOPT = CASES["nvfp4"][1]


def mixed(layers: object) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def without(block: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != key}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([], r"found quantization_config \[\], expected an object"),
        ({}, r"found no quant_method"),
        ({"transformer": FP8, "text_encoder": None}, r"found no quant_method"),
        ({**FP8, "method": "fp8"}, r"found both quant_method and method"),
        ({**FP8, "quant_method": "pf8"}, r"found quant_method 'pf8', expected one of fp8, .*did you mean 'fp8'\?"),
        ({**FP8, "quant_method": ["fp8"]}, r"found quant_method \['fp8'\]"),
        ({**FP8, "quant_method": "svdquant"}, r"found quant_method 'svdquant', expected one of"),
        ({**FP8, "producer": {"name": "x"}}, r"found unknown key 'producer' for fp8, expected only"),
        ({**FP8, "modules_to_not_convert": []}, r"found unknown key 'modules_to_not_convert'"),
        ({**FP8, "ignored_layer": []}, r"unknown key 'ignored_layer'.*did you mean 'ignored_layers'\?"),
        ({**INT8, "weight_block_size": [1, 1]}, r"found unknown key 'weight_block_size' for int8"),
        ({**DUAL, "is_checkpoint_mxfp4_serialized": True}, r"unknown key 'is_checkpoint_mxfp4_serialized'"),
        (without(FP8, "is_checkpoint_fp8_serialized"), r"found no is_checkpoint_fp8_serialized, .*quantizes online"),
        ({**FP8, "is_checkpoint_fp8_serialized": False}, r"is_checkpoint_fp8_serialized False, expected true"),
        ({**FP8, "is_checkpoint_fp8_serialized": 1}, r"is_checkpoint_fp8_serialized 1, expected true"),
        ({**FP8, "activation_scheme": "statik"}, r"activation_scheme: found 'statik' with fp8"),
        ({**FP8, "activation_scheme": ["static"]}, r"found activation_scheme \['static'\], expected a string"),
        ({**INT8, "activation_scheme": "static"}, r"found 'static' with int8, expected dynamic"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size \[128\], expected two sizes"),
        ({**FP8, "weight_block_size": [True, 1]}, r"weight_block_size \[True, 1\], expected two sizes"),
        ({**FP8, "weight_block_size": [0, 1]}, r"expected two positive sizes"),
        ({**FP8, "weight_block_size": [1, 1], "activation_scheme": "static"}, r"weight_block_size: found with fp8 and"),
        ({**FP8, "ignored_layers": "img_mlp"}, r"ignored_layers 'img_mlp', expected a list"),
        ({**FP8, "ignored_layers": [1]}, r"found 1 in ignored_layers"),
        ({**FP8, "ignored_layers": [""]}, r"found '' in ignored_layers"),
        ({**FP8, "store_dtype": "mxfp4"}, r"found store_dtype 'mxfp4', a policy of the runtime"),
        ({**MXFP4, "require_smooth_scale": "yes"}, r"require_smooth_scale 'yes', expected true or false"),
        ({**MXFP4, "mxfp4_scale_alg": 2}, r"found mxfp4_scale_alg 2, a policy of the runtime"),
        ({**DUAL, "w4a8_fallback_steps": [1]}, r"found w4a8_fallback_steps \[1\]"),
        (
            {**MODELOPT, "quant_algo": "FP8_PB_WO"},
            r"quant_algo 'FP8_PB_WO', expected 'FP8', 'FP8_PER_CHANNEL_PER_TOKEN'",
        ),
        ({**MODELOPT, "quant_algo": "MIXED_PRECISION"}, r"found quantized_layers None, expected an object of layers"),
        (mixed({}), r"found quantized_layers \{\}, expected an object of layers"),
        (
            mixed({"a": "FP8"}),
            r"found quant_algo None of 'a' in quantized_layers, expected one of FP8, FP8_PER_CHANNEL",
        ),
        (mixed({"a": {"quant_algo": "FP8_PB_WO"}}), r"found quant_algo 'FP8_PB_WO' of 'a'"),
        (mixed({"a": {"quant_algo": ["FP8"]}}), r"found quant_algo \['FP8'\] of 'a'"),
        (mixed({"": {"quant_algo": "FP8"}}), r"found '' in quantized_layers, expected layer names"),
        (mixed({"a": {"quant_algo": "NVFP4", "group_size": 32}}), r"found group_size 32 of 'a'"),
        (without(MODELOPT, "quant_algo"), r"found quant_algo None"),
        ({**MODELOPT, "config_groups": []}, r"found config_groups \[\], expected an object of objects"),
        ({**MODELOPT, "config_groups": {"group_0": None}}, r"expected an object of objects"),
        ({**MODELOPT, "config_groups": {"group_0": {}}}, r"found weights None in config_groups"),
        ({**MODELOPT, "config_groups": {"g": {"weights": {**NVFP4, "group_size": 32}}}}, r"found group_size 32"),
        ({**MODELOPT, "ignore": {"a": 1}}, r"found ignore \{'a': 1\}, expected a list"),
        ({**FP8, "x" * 100_000: "\n"}, r"found unknown key 'x+\.\.\.x+'"),
        ({**FP8, "ignored_layers": {"\n": "\n" * 100_000}}, r"found ignored_layers"),
    ],
)
def test_what_the_runtime_would_refuse_or_misread_is_one_line(block: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        from_block(block, "transformer/config.json")
    assert str(error.value).startswith("transformer/config.json: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_method_alone_is_an_alias_as_in_the_runtime() -> None:
    assert from_block({"method": "fp8", **without(FP8, "quant_method")}, "config.json") == from_block(
        FP8, "config.json"
    )


def test_keys_that_mean_nothing_to_stored_weights_are_read_over() -> None:
    block = {**DUAL, "num_bf16_fallback_layers": 5, "w4a8_fallback_layers": []}
    assert from_block(block, "config.json") == from_block(DUAL, "config.json")
    assert from_block({**MXFP4, "mxfp4_scale_alg": 0}, "config.json") == from_block(MXFP4, "config.json")
    assert from_block({**FP8, "ignored_layers": None}, "config.json").ignored_layers == ()


def test_modelopt_fp8_is_static_fp8() -> None:
    block = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["*proj_out*"],
        "producer": {"name": "modelopt"},
    }
    assert from_block(block, "config.json") == QuantizationConfig("fp8", "static", ignored_layers=("*proj_out*",))


def test_patterns_of_modelopt_survive() -> None:
    block = {**MODELOPT, "ignore": ["*proj_out*", "blocks.[0-3].*"]}
    assert to_block(from_block(block, "config.json"))["ignore"] == block["ignore"]


def test_ignored_names_are_merged_name_and_parts() -> None:
    groups = [
        LayerGroup("b.0.attn.to_qkv", ("b.0.attn.to_q", "b.0.attn.to_k", "b.0.attn.to_v"), is_fused=True),
        LayerGroup("b.0.attn.to_out.0", ("b.0.attn.to_out.0",), is_fused=False),
        LayerGroup("b.0.ffn.net_2", ("b.0.ffn.net.2",), is_fused=False),
        LayerGroup("b.0.ffn.net_2", ("b.0.ffn.net.2",), is_fused=False),
    ]
    assert ignored_names(groups) == [
        "b.0.attn.to_k",
        "b.0.attn.to_out",
        "b.0.attn.to_out.0",
        "b.0.attn.to_q",
        "b.0.attn.to_qkv",
        "b.0.attn.to_v",
        "b.0.ffn.net.2",
        "b.0.ffn.net_2",
    ]


def modelopt_excludes(prefix: str, entries: list[str]) -> bool:
    """The rule of ModelOpt's reader in vLLM: an entry is a name, a part of a name, or a pattern."""
    return any(entry == prefix or entry in prefix or fnmatch(prefix, entry) for entry in entries)


def test_modelopt_ignores_the_layers_that_were_meant_and_no_others(
    tiny_specs: Callable[[str], Mapping[str, TensorSpec]],
) -> None:
    """FLUX.2 has `transformer_blocks.0.attn.to_q` and `single_transformer_blocks.0.attn.to_qkv_mlp_proj`."""
    groups = find_family("Flux2Transformer2DModel").layer_groups(tiny_specs("Flux2Transformer2DModel"), "vllm-omni")
    for group in groups:
        config = QuantizationConfig("nvfp4", "static", ignored_layers=tuple(ignored_names([group])))
        excluded = {
            each.runtime_name for each in groups if modelopt_excludes(each.runtime_name, to_block(config)["ignore"])
        }
        assert excluded == {group.runtime_name}
