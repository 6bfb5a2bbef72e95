"""AutoRound's spelling: the config block, and golden bytes of MX and NVFP4."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from omni_convert.formats.dialects.auto_round import AUTO_ROUND, to_block
from omni_convert.formats.dialects.base import JudgedComponent
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4


def test_an_exception_never_ends_as_a_quantized_layer_does() -> None:
    layers = ("single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.proj_mlp")
    block = to_block(64, layers, ("proj_out", "x_embedder", "transformer_blocks.0.ff.net.2"))
    assert set(block["extra_config"]) == {"x_embedder", "transformer_blocks.0.ff.net.2"}
    assert block["block_name_to_quantize"] == "single_transformer_blocks"


# What auto-round 0.16.1's own rounding and packing give for the weight of `golden_weight`.
GOLDEN = {
    "mxfp8": (
        Mxfp8("auto_round", search=False),
        {
            "weight": "006470767a7c7b605ce1f0f8fcfee6ebe93e6f787d686f727066e9f7e5eff4f6"
            "f5f04c5c6b73787a797653ddedf5fafcfce3e3486c767b7e676d6c62e8f5fbe7",
            "weight_scale": "7979",
        },
    ),
    "mxfp4": (
        Mxfp4("auto_round", search=False),
        {
            "weight_packed": "1064761791ecffba0a64274424eacaedcd1053666690dbfe9f0953773213daaf",
            "weight_scale": "7f7f",
        },
    ),
    "nvfp4": (
        Nvfp4(search=False),
        {
            "weight_packed": "1053661691dcfeaa0a63274424dac9ddcd1053666690dbfe9f0953763213daae",
            "weight_scale": "7e7d7c7e",
        },
    ),
}


def golden_weight() -> Tensor:
    """float32 [2, 32]."""
    index = torch.arange(64, dtype=torch.float64)
    return ((0.37 * index).sin() * (1 + index % 7)).float().view(2, 32)


@pytest.mark.parametrize("method", GOLDEN)
def test_golden_bytes(method: str) -> None:
    fmt, expected = GOLDEN[method]
    stored = encoded(fmt, golden_weight())
    assert {name: stored[name].view(torch.uint8).numpy().tobytes().hex() for name in expected} == expected


def encoded(fmt: QuantizingFormat, weight: Tensor) -> dict[str, Tensor]:
    """The tensors on disk; a static format gets an input scale of 2^-7."""
    tensors = fmt.quantize(weight)
    if isinstance(fmt, Nvfp4):
        fmt = Nvfp4(static=True)
        tensors["input_scale"] = torch.tensor(2.0**-7)
    spelling = AUTO_ROUND.spelling(fmt, (weight.shape[0], weight.shape[1]))
    assert not isinstance(spelling, str), spelling
    return spelling.encode(tensors)


def test_nvfp4_has_both_global_scales_as_divisors() -> None:
    stored = encoded(Nvfp4(), golden_weight())
    assert stored["input_global_scale"].tolist() == [128.0]
    golden = encoded(Nvfp4(search=False), golden_weight())["weight_global_scale"]
    assert golden.tolist() == [pytest.approx(384.95227, rel=2**-23)]
    assert set(stored) == {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}


@pytest.mark.parametrize(
    ("fmt", "columns", "reason"),
    [
        (Nvfp4(), 64, r"input_global_scale in every layer; calibrate, with --calib"),
        (Mxfp8(), 48, r"mxfp8 needs in_features % 32 == 0, found 48"),
        (Mxfp4(), 48, r"mxfp4 needs in_features % 32 == 0, found 48"),
        (Nvfp4(static=True), 40, r"nvfp4 needs in_features % 16 == 0, found 40"),
        (Mxfp4(smooth=True), 64, r"found mxfp4 with mul_scale"),
    ],
)
def test_what_it_cannot_hold(fmt: QuantizingFormat, columns: int, reason: str) -> None:
    found = AUTO_ROUND.spelling(fmt, (64, columns))
    assert isinstance(found, str)
    assert re.search(reason, found), found


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        (Mxfp8(), {"bits": 8, "group_size": 32, "data_type": "mx_fp", "act_data_type": "mx_fp"}),
        (Mxfp4(), {"bits": 4, "group_size": 32, "data_type": "mx_fp", "act_data_type": "mx_fp"}),
        (
            Nvfp4(static=True),
            {"bits": 4, "group_size": 16, "data_type": "nv_fp", "act_data_type": "nv_fp4_with_static_gs"},
        ),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_the_block_has_the_facts_that_vllm_asserts(fmt: QuantizingFormat, expected: dict[str, object]) -> None:
    block = AUTO_ROUND.block({"blocks.0.to_q": fmt}, ("x_embedder",))
    always = {"quant_method": "auto-round", "sym": True, "packing_format": "auto_round:llm_compressor"}
    assert block.items() >= (expected | always).items()
    assert block["act_bits"] == block["bits"]
    assert block["block_name_to_quantize"] == "blocks"
    exception = {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}
    assert block["extra_config"] == {"x_embedder": exception}


def test_verdicts_name_the_versions_of_vllm_omni() -> None:
    def outcomes(fmt: QuantizingFormat) -> dict[str, str]:
        return {
            verdict.runtime: verdict.outcome for verdict in AUTO_ROUND.verdicts(JudgedComponent({"blocks.0.to_q": fmt}))
        }

    for fmt in (Mxfp4(), Nvfp4(static=True)):
        assert outcomes(fmt)["vLLM-Omni 0.30"] == "refuses"
        assert outcomes(fmt)["vLLM-Omni 0.32.0rc1"] == "loads"
    assert outcomes(Mxfp8())["vLLM-Omni 0.30"] == "loads"
    assert outcomes(Nvfp4())["vLLM-Omni 0.32.0rc1"] == "wrong"


STACK, LINEAR, TOWER = "thinker.model.layers", "thinker.model.layers.0.mlp.up_proj", "thinker.visual.blocks.0.attn.qkv"
UNQUANTIZED = {"bits": 16, "data_type": "float"}


@pytest.mark.parametrize(
    ("block", "declared"),
    [
        ({}, (LINEAR, TOWER)),
        ({"block_name_to_quantize": STACK}, (LINEAR,)),
        ({"block_name_to_quantize": [STACK, "thinker.visual.blocks"]}, (LINEAR, TOWER)),
        ({"extra_config": {".*visual.*": UNQUANTIZED}}, (LINEAR,)),
        ({"extra_config": {LINEAR: UNQUANTIZED}}, (TOWER,)),
        ({"block_name_to_quantize": STACK, "extra_config": {"lm_head": {"bits": 4}}}, (LINEAR, "thinker.lm_head")),
        ({"quant_method": "gptq"}, ()),
    ],
    ids=["all", "a stack", "two stacks", "a pattern", "a name", "the head", "GPTQ"],
)
def test_the_block_says_which_layers_are_quantized(block: dict[str, object], declared: tuple[str, ...]) -> None:
    block = {"quant_method": "auto-round", **block}
    layers = (LINEAR, TOWER, "thinker.lm_head")
    assert tuple(stem for stem in layers if AUTO_ROUND.declares_quantized(block, stem)) == declared
