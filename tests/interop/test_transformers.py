"""Text encoders in transformers' own FP8 and MXFP8: read as it reads them, and ours loaded by plain `from_pretrained`.

Without a GPU for FP8, `FineGrainedFP8HfQuantizer` dequantizes what it loads; what it would build on a GPU is compared
by names, dtypes and shapes. Its kernels are not run.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.views.opened import QuantizedLayer

STEM = "model.layers.0.mlp.up_proj"
WEIGHTS = "model.safetensors"
BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
OPTIONS: dict[str, dict[str, Any]] = {"fp8": {"weight_block_size": (32, 32)}, "mxfp8": {}}


def layer_of(tmp_path: Path, tensors: dict[str, Tensor], block: dict[str, object]) -> QuantizedLayer:
    save_file({f"{STEM}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    opened = open_quantized(tmp_path)
    assert opened.dialect == "transformers"
    return opened.layers[STEM]


def dequantized_by_them(codes: Tensor, scale: Tensor, block_size: list[int]) -> Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    return _dequantize_fp8_weight(codes, scale, block_size, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_fp8_in_blocks_is_read_as_transformers_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(0)) * 0.05
    scale = torch.full((2, 3), 2.0**-9).to(dtype)
    codes = (weight * 2**9).clamp(-448, 448).to(torch.float8_e4m3fn)
    layer = layer_of(tmp_path, {"weight": codes, "weight_scale_inv": scale}, BLOCK)
    assert layer.format.label == "fp8 128x128"
    assert layer.dequantize(0, 192).equal(dequantized_by_them(codes, scale, [128, 128]))


def test_as_many_blocks_as_rows_are_not_read_as_scales_of_rows(tmp_path: Path) -> None:
    codes = torch.ones(384, 128 * 128).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 385).view(3, 128)
    layer = layer_of(tmp_path, {"weight": codes, "weight_scale_inv": scale}, BLOCK)
    assert layer.format.label == "fp8 128x128"
    assert layer.dequantize(0, 384).equal(dequantized_by_them(codes, scale, [128, 128]))


@pytest.mark.parametrize("method", ["fp8", "mxfp8"])
@pytest.mark.parametrize("is_bytes", [False, True], ids=["e8m0", "bytes"])
def test_mxfp8_is_read_as_transformers_quantizes_it(tmp_path: Path, method: str, is_bytes: bool) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    block = BLOCK | {"quant_method": method, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(0)) * 0.05
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config.from_dict(block))
    codes, scale = Fp8Quantize(quantizer).convert({"weight": weight}).values()
    assert scale.dtype is torch.float8_e8m0fnu
    stored = scale.view(torch.uint8) if is_bytes else scale
    layer = layer_of(tmp_path, {"weight": codes, "weight_scale_inv": stored}, block)
    assert layer.format.label == "mxfp8"
    assert layer.dequantize(0, 96).equal(dequantized_by_them(codes, scale, [1, 32]))


@pytest.fixture
def text_encoder(tiny_pipeline_folder: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A function that converts the tiny pipeline's text encoder, and returns the folder."""

    def convert(method: str, **options: Any) -> Path:
        recipe = Recipe(
            method=method,
            component={"text_encoder": method},
            dialect="transformers",
            runtime="diffusers",
            **OPTIONS[method] | options,
        )
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
        return tmp_path / "out" / "text_encoder"

    return convert


@pytest.mark.parametrize("method", OPTIONS)
def test_a_text_encoder_of_ours_is_loaded_by_transformers(
    tiny_pipeline_folder: Path, text_encoder, method: str
) -> None:  # type: ignore[no-untyped-def]
    from transformers import Qwen3ForCausalLM

    folder = text_encoder(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: no GPU here
        loaded = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = Qwen3ForCausalLM.from_pretrained(tiny_pipeline_folder / "text_encoder", dtype=torch.bfloat16)
    with open_quantized(folder) as opened, torch.no_grad():
        assert opened.dialect == "transformers"
        assert len(opened.layers) == 14
        for stem, layer in opened.layers.items():
            expected.get_submodule(stem).weight.copy_(layer.dequantize(0, layer.shape[0]))
            assert loaded.get_submodule(stem).weight.equal(expected.get_submodule(stem).weight), stem
        tokens = torch.arange(1, 24)[None]
        assert loaded(tokens).logits.equal(expected(tokens).logits)


@pytest.mark.parametrize("ignored", [(), ("layers.1",)], ids=["all", "some ignored"])
@pytest.mark.parametrize("method", OPTIONS)
def test_what_transformers_builds_on_a_gpu_takes_our_tensors(
    text_encoder, method: str, ignored: tuple[str, ...]
) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoConfig, FineGrainedFP8Config, Qwen3ForCausalLM
    from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear

    folder = text_encoder(method, ignored_layers=ignored)
    config = AutoConfig.from_pretrained(folder)
    quantization = FineGrainedFP8Config.from_dict(config.quantization_config)
    with torch.device("meta"):
        model: nn.Module = Qwen3ForCausalLM(config).to(torch.bfloat16)
        model = replace_with_fp8_linear(model, quantization.modules_to_not_convert, quantization, pre_quantized=True)
    theirs = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    ours = {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}
    assert theirs == ours
    with open_quantized(folder) as opened:
        assert {name for name, linear in model.named_modules() if isinstance(linear, FP8Linear)} == set(opened.layers)
        assert len(opened.layers) == (7 if ignored else 14)


def test_blocks_that_transformers_would_cut_otherwise_are_not_written(text_encoder) -> None:  # type: ignore[no-untyped-def]
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    codes = torch.ones(96, 64).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0], [2.0]])  # 64 rows and 32
    theirs = Fp8Dequantize(FineGrainedFP8HfQuantizer(FineGrainedFP8Config()))._dequantize_one(codes, scale)
    assert theirs[48:64].eq(2).all()  # the reason
    with open_quantized(text_encoder("fp8", weight_block_size=(96, 64))) as opened:
        assert {layer.shape[0] for layer in opened.layers.values()} == {32, 64}  # of which one block is enough
