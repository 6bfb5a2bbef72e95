"""build_quant_config reads what vLLM-Omni's does, in its order."""

import pytest

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.errors import RecipeError
from omni_convert.loaders import ComponentQuantizationConfig, build_quant_config, resolve_component_quant_config
from omni_convert.loaders.request.spec import GgufModel

FP8 = QuantizationConfig("fp8")
INT8 = QuantizationConfig("int8")
W4A16 = QuantizationConfig("w4a16", "none", group_size=128)
PER_CHANNEL = QuantizationConfig("fp8", per_channel=True)
TABLE = {"a.to_q": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}
NESTED = {"quantized_layers": TABLE, "exclude_modules": ["lm_head"]}
MIXED = QuantizationConfig("mixed", layers=(("a.to_q", PER_CHANNEL), ("b", QuantizationConfig("nvfp4", "static"))))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, None),
        ("none", None),
        ("None", None),
        ("fp8", FP8),
        ("FP8", FP8),
        ({"method": "int8"}, INT8),
        ({"quant_method": "int8"}, INT8),
        ({"method": "fp8", "ignored_layers": ["img_mlp"]}, QuantizationConfig("fp8", ignored_layers=("img_mlp",))),
        ({"method": "fp8", "weight_block_size": [128, 128]}, QuantizationConfig("fp8", weight_block_size=(128, 128))),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "is_checkpoint_fp8_serialized": True}, FP8),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}, QuantizationConfig("fp8", "static")),
        ({"producer": {"name": "ModelOpt"}, "quant_algo": "FP8"}, QuantizationConfig("fp8", "static")),
        ({"method": "modelopt", "quant_algo": "FP8"}, QuantizationConfig("fp8", "static")),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
            QuantizationConfig("fp8", "static"),
        ),
        ({"method": "ModelOpt-FP4", "quantization": {"quant_algo": "NVFP4"}}, QuantizationConfig("nvfp4", "static")),
        ({"method": "modelopt", "quant_algo": "fp8"}, QuantizationConfig("fp8", "static")),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, PER_CHANNEL),
        (
            {"producer": {"name": "modelopt"}, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["*embed*"]},
            QuantizationConfig("fp8", ignored_layers=("*embed*",), per_channel=True),
        ),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}},
            PER_CHANNEL,
        ),
        ({"method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION", "quantized_layers": TABLE}, MIXED),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": TABLE}, MIXED),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"} | NESTED},
            QuantizationConfig("mixed", ignored_layers=("lm_head",), layers=MIXED.layers),
        ),
        ({"method": None, "quant_method": "int8"}, INT8),
        ({"method": "fp8", "ignored_layers": None, "store_dtype": None}, FP8),
        ({"method": "int8", "is_checkpoint_int8_serialized": False}, INT8),
        ({"method": "mxfp4", "mxfp4_scale_alg": 0, "w4a8_fallback_steps": []}, QuantizationConfig("mxfp4")),
        (
            {"method": "mxfp4_dualscale", "is_checkpoint_serialized": True, "num_bf16_fallback_layers": 5},
            QuantizationConfig("mxfp4_dualscale"),
        ),
        ({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}, QuantizationConfig("mxfp4_dualscale")),
        ({"method": "fp8", "activation_scheme": "static"}, QuantizationConfig("fp8", "static")),
        ({"method": "inc", "weight_bits": 4, "group_size": 128, "unknown": 1}, W4A16),
        ({"quant_method": "auto_round", "bits": 4, "group_size": 128}, W4A16),
        ({"quant_method": "intel/auto-round", "bits": 4, "group_size": 128}, W4A16),
        ({"method": "fp8", "modules_to_not_convert": ["a"]}, QuantizationConfig("fp8", ignored_layers=("a",))),
        (
            {"method": "fp8", "modules_to_not_convert": ["a"], "ignored_layers": ["b"]},
            QuantizationConfig("fp8", ignored_layers=("b",)),
        ),
        ("mxfp4-dualscale", QuantizationConfig("mxfp4_dualscale")),
        ("fp8_storage", QuantizationConfig("fp8_storage", "none")),
        ("w4a16", QuantizationConfig("w4a16", "none")),
        ({"method": "gguf", "gguf_model": "a.gguf"}, GgufModel("gguf", "none", gguf_model="a.gguf")),
        ({"method": "w4a16", "group_size": 32}, QuantizationConfig("w4a16", "none", group_size=32)),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 64, "extra_config": {"a": {"bits": 16}}},
            QuantizationConfig("w4a16", "none", ignored_layers=("a",), group_size=64),
        ),
    ],
    ids=str,
)
def test_one_method(spec, expected):
    assert build_quant_config(spec) == expected


def test_keyword_arguments_count_for_modelopt_where_the_runtime_merges_them():
    static = QuantizationConfig("fp8", "static")
    assert build_quant_config({"method": None, "quant_method": "modelopt"}, quant_algo="FP8") == static
    for key in ("method", "quant_method"):
        with pytest.raises(ValueError, match="missing quant_algo"):
            build_quant_config({key: "modelopt"}, quant_algo="FP8")


@pytest.mark.parametrize("name", ["inc", "INC", "auto-round", "auto_round"])
def test_names_that_the_runtime_builds_alike_take_options_as_keyword_arguments(name):
    assert build_quant_config(name, bits=4, group_size=128) == W4A16
    assert build_quant_config({"method": name, "bits": 8}, weight_bits=4, bits=4, group_size=128) == W4A16


def test_a_config_object_is_returned_as_it_is():
    by_component = ComponentQuantizationConfig({"transformer": FP8})
    assert build_quant_config(FP8, ignored_layers=["x"]) is FP8
    assert build_quant_config(by_component) is by_component


def test_keyword_arguments_override_the_spec():
    spec = {"method": "fp8", "ignored_layers": ["a"]}
    assert build_quant_config(spec, ignored_layers=["b"]).ignored_layers == ("b",)
    assert build_quant_config("fp8", ignored_layers=["b"]).ignored_layers == ("b",)
    assert spec == {"method": "fp8", "ignored_layers": ["a"]}


def test_a_dict_by_component():
    config = build_quant_config(
        {"transformer": {"method": "fp8"}, "vae": None, "text_encoder": "int8", "default": INT8.method}
    )
    assert config.component_configs == {"transformer": FP8, "vae": None, "text_encoder": INT8}
    assert config.default_config == INT8


def test_components_resolve_by_longest_prefix_and_none_is_final():
    config = ComponentQuantizationConfig({"transformer": FP8, "transformer_2": None, "text": INT8}, default_config=INT8)
    assert config.resolve("transformer") is FP8
    assert config.resolve("transformer_blocks.0") is FP8
    assert config.resolve("transformer_2") is None
    assert config.resolve("text_encoder") is INT8
    assert config.resolve("vae") is INT8
    assert resolve_component_quant_config(config, "transformer_2") is None
    assert resolve_component_quant_config(FP8, "transformer_2") is FP8


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({}, ValueError, "no 'method'"),
        ("fp9", ValueError, "found method 'fp9', expected one of fp8, int8"),
        ({"ignored_layers": ["x"]}, ValueError, "no 'method'"),
        (
            {"transformer": {"method": "fp8"}, "vae": {"ignored_layers": []}},
            ValueError,
            "component 'vae' has no 'method'",
        ),
        ({"transformer": "none", "vae": None}, ValueError, "found method 'none'"),
        ({"method": "fp8", "bits": 8}, TypeError, r"no option bits, expected \(.*activation_scheme"),
        (8, TypeError, "found int"),
        ({"method": 8}, ValueError, "found method '8'"),
        (
            {"method": "fp8", "is_checkpoint_int8_serialized": True},
            TypeError,
            "no option is_checkpoint_int8_serialized",
        ),
        ({"method": "fp8", "layers": []}, TypeError, "no option layers"),
        ({"method": "fp8", "ignored_layers": "img_mlp"}, TypeError, "found ignored_layers 'img_mlp', expected a list"),
        ({"method": "fp8", "weight_block_size": ["a", 1]}, TypeError, "of wrong types"),
        (
            {"method": "fp8", "store_dtype": "mxfp4"},
            ValueError,
            "found store_dtype 'mxfp4', which the runtime supports",
        ),
        ({"method": "mxfp4", "w4a8_fallback_steps": [1]}, ValueError, "leave it out"),
        ({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": 5}, ValueError, "name the blocks in ignored_layers"),
        ("auto-round", TypeError, "without bits and group_size"),
        ({"method": "inc", "bits": 8, "group_size": 128}, ValueError, "expected bits 4"),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"},
            ValueError,
            "AutoRoundConfig",
        ),
        ({"method": "torchao"}, ValueError, "found method 'torchao'"),
        ({"method": "gguf"}, ValueError, "found method 'gguf' with gguf_model None, expected the path of a .gguf file"),
        ({"method": "gguf", "gguf_file": "x"}, TypeError, r"no option gguf_file, .*did you mean 'gguf_model'\?"),
        ({"method": "fp8", "quant_method": "fp8"}, TypeError, "no option quant_method"),
        ({"quant_algo": "FP8"}, ValueError, "no 'method'"),
        ("modelopt", ValueError, "found method 'modelopt'"),
        ({"method": "modelopt"}, ValueError, "missing quant_algo"),
        ({"quant_method": "modelopt", "quant_algo": ""}, ValueError, "missing quant_algo"),
        ({"method": "modelopt", "quant_algo": "MXFP8"}, ValueError, "found method 'modelopt', expected .* ModelOpt"),
        ({"producer": {"name": "modelopt"}}, ValueError, "no 'method'"),
        ({"method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION"}, ValueError, "found quantized_layers None"),
        (
            {"method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "INT8"}}},
            ValueError,
            "found quant_algo 'INT8' of 'a' in quantized_layers, expected one of FP8, ",
        ),
        ({"method": "modelopt", "quant_algo": "W4A8_AWQ"}, ValueError, "found method 'modelopt'"),
        ({"method": "int8", "activation_scheme": "static"}, ValueError, "activation_scheme"),
        ({"method": "w4a16", "group_size": 7}, ValueError, "group_size: found 7, expected one of 32, 64, 128"),
        ({"method": "w4a16", "group_size": True}, ValueError, "group_size: found True, expected one of 32"),
        ({"method": "inc", "bits": 4, "group_size": 7}, ValueError, "group_size: found 7, expected one of 32"),
        ({"method": "auto-round", "bits": 4, "group_size": "x"}, ValueError, "group_size: found 'x', expected one of"),
        ({"method": "fp8", "per_channel": "no"}, ValueError, "per_channel: found 'no', expected True or False"),
        (
            {"method": "fp8", "per_channel": True, "weight_block_size": [128, 128]},
            ValueError,
            "per_channel: found with weight_block_size",
        ),
        ({"methd": "int8"}, ValueError, r"no 'method' in \['methd'\], expected one; did you mean 'method'\?"),
        ({"transformer": {"methd": "int8"}}, ValueError, r"'transformer' has no .*'methd'.*; did you mean 'method'\?"),
        ({"transformer": {"methd": "int8"}, "vae": None}, ValueError, r"'transformer' has no .*did you mean 'method'"),
        ({"transformer": {}}, ValueError, "component 'transformer' has no 'method'"),
        (
            {"transformer": "int8"},
            ValueError,
            r"found 'int8' of 'transformer', expected \{'transformer': \{'method': 'int8'\}\}",
        ),
        ({"method": "fp8", "ignored_layer": ["a"]}, TypeError, r"no option ignored_layer, .*mean 'ignored_layers'\?"),
        ({"method": "fp8", 1: 2}, TypeError, "found the key 1, expected names of options"),
        ({"transformer": {"method": "fp8", 1: 2}}, TypeError, "found the key 1, expected names of options"),
        ({1: {"method": "fp8"}}, TypeError, "found the key 1, expected names of options"),
    ],
    ids=str,
)
def test_errors_are_those_of_the_runtime_and_one_line_for_the_user(spec, error, message):
    with pytest.raises(error, match=message) as raised:
        build_quant_config(spec)
    assert isinstance(raised.value, RecipeError)
    assert "\n" not in str(raised.value)
