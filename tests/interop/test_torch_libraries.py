"""Spellings of dependencies: diffusers for Black Forest Labs' files, and transformers; and AutoRound's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omni_convert.formats.quantized import QuantizedLayer, open_quantized

STEM = "blocks.0.proj"
WEIGHTS = "model.safetensors"


def layer_of(tmp_path: Path, tensors: dict[str, Tensor], block: dict[str, object] | None = None) -> QuantizedLayer:
    save_file({f"{STEM}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, tmp_path / WEIGHTS)
    if block is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    return open_quantized(tmp_path).layers[STEM]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(192, 320, generator=torch.Generator().manual_seed(0)) * 0.05


def test_files_of_black_forest_labs_are_read_as_diffusers_reads_them(tmp_path: Path, weight: Tensor) -> None:
    from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4, quantize_fp8r, quantize_nvfp4

    codes, scale = quantize_fp8r(weight)
    layer = layer_of(tmp_path, {"weight": codes, "weight_scale": scale})
    assert layer.format.label == "fp8 per row"
    assert layer.dequantize(0, 192).equal(dequantize_fp8r(codes, scale))

    codes, scale, overall = quantize_nvfp4(weight)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": overall, "input_scale": torch.tensor(0.5)}
    assert layer_of(tmp_path, tensors).dequantize(0, 192).equal(dequantize_nvfp4(codes, scale, overall))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_fp8_in_blocks_is_read_as_transformers_reads_it(tmp_path: Path, weight: Tensor, dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    scale = torch.full((2, 3), 2.0**-9).to(dtype)
    codes = (weight * 2**9).clamp(-448, 448).to(torch.float8_e4m3fn)
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    layer = layer_of(tmp_path, {"weight": codes, "weight_scale_inv": scale}, block)
    assert layer.format.label == "fp8 128x128"
    assert layer.dequantize(0, 192).equal(_dequantize_fp8_weight(codes, scale, [128, 128], torch.float32))


@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "zero points"])
def test_w4a16_is_read_as_auto_round_packs_it(import_peer, tmp_path: Path, is_symmetric: bool) -> None:  # type: ignore[no-untyped-def]
    packing = import_peer("auto_round_extension.torch.qlinear_torch_zp")
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 64, bias=False)
    scales = torch.rand(64, 2, generator=draw).half().float() * 0.01 + 0.001
    zeros = torch.full((64, 2), 8.0) if is_symmetric else torch.randint(1, 16, (64, 2), generator=draw).float()
    packed = packing.QuantLinear(4, 128, 256, 64, bias=False)
    packed.pack(linear, scales, zeros, device="cpu")
    tensors = {name: tensor for name, tensor in packed.state_dict().items() if name != "g_idx"}
    block: dict[str, object] = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}
    layer = layer_of(tmp_path, tensors, block)
    assert layer.format.label == "int4 group 128"
    theirs = packed(torch.eye(256)).T.float()  # a forward pass over the identity is the weight
    torch.testing.assert_close(layer.dequantize(0, 64), theirs, rtol=2**-9, atol=0)  # they multiply in float16
    assert layer.dequantize(3, 5).equal(layer.dequantize(0, 64)[3:5])
