"""compressed-tensors' spelling against its own compressors, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEM = "blocks.0.proj"


@pytest.fixture
def quantization(import_peer):  # type: ignore[no-untyped-def]  # their module
    return import_peer("compressed_tensors.quantization")


def compressor(import_peer, layout: str):  # type: ignore[no-untyped-def]  # their class
    return import_peer("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(layout)


def scheme_of(quantization, preset: str, layout: str):  # type: ignore[no-untyped-def]  # their object
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    scheme.format = layout
    return scheme


def scales_for(weight: Tensor, preset: str) -> dict[str, Tensor]:
    """The scales that llm-compressor's observers would find, for each preset."""
    rows, columns = weight.shape
    if preset == "NVFP4A16":
        overall = 448 * 6 / weight.abs().amax()
        blocks = weight.view(rows, -1, 16).abs().amax(-1) / 6 * overall
        return {"weight_scale": blocks.to(torch.float8_e4m3fn).float(), "weight_global_scale": overall.reshape(1)}
    if preset in ("MXFP4A16", "MXFP8A16"):
        largest = 6 if preset.startswith("MXFP4") else 448
        amax = weight.view(rows, -1, 32).abs().amax(-1)
        return {"weight_scale": torch.exp2(torch.ceil(torch.log2(amax / largest)))}
    if preset == "FP8_BLOCK":
        return {"weight_scale": weight.view(rows // 128, 128, columns // 128, 128).abs().amax((1, 3)) / 448}
    largest = 127 if preset == "W8A8" else 448
    return {"weight_scale": weight.abs().amax(dim=1, keepdim=True) / largest}


PRESETS = {
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "W8A8": "int-quantized",
    "MXFP8A16": "mxfp8-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "W4A16": "pack-quantized",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_they_compress_is_read(quantization, import_peer, tmp_path: Path, preset: str) -> None:  # type: ignore[no-untyped-def]
    layout = PRESETS[preset]
    scheme, packer = scheme_of(quantization, preset, layout), compressor(import_peer, layout)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    scales = scales_for(weight, preset)
    if preset == "W4A16":
        scales = {"weight_scale": weight.view(256, -1, 128).abs().amax(-1) / 7.5}
    compressed = packer.compress({"weight": weight, **scales}, scheme)
    theirs = packer.decompress(dict(compressed), scheme)["weight"]
    save_file(
        {f"{STEM}.{suffix}": tensor.detach().contiguous() for suffix, tensor in compressed.items()},
        tmp_path / WEIGHTS,
    )
    block = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    with open_quantized(tmp_path) as opened:
        assert opened.dialect == "compressed-tensors"
        ours = opened.layers[STEM].dequantize(0, 256)
    assert_same_numbers(ours, theirs)


def assert_same_numbers(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the rounding of products, which they take in bfloat16, and of reciprocals."""
    precision = 2**-7 if theirs.dtype is torch.bfloat16 else 2**-20
    torch.testing.assert_close(ours, theirs.float(), rtol=precision, atol=0)


@pytest.mark.parametrize("method", ["fp8", "fp8 blocks", "int8", "mxfp8", "mxfp4", "nvfp4"])
def test_what_we_write_is_decompressed_by_them(  # type: ignore[no-untyped-def]
    quantization, import_peer, tiny_pipeline_folder: Path, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"weight_block_size": (64, 64)} if method == "fp8 blocks" else {}
    method = method.split()[0]
    convert_checkpoint(
        tiny_pipeline_folder, tmp_path / "ours", Recipe(method=method, dialect="compressed-tensors", **options)
    )
    folder = tmp_path / "ours" / "transformer"
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(block)  # their class takes our block
    (scheme,) = config.config_groups.values()
    packer = compressor(import_peer, scheme.format or config.format)
    tensors = load_file(folder / WEIGHTS)
    with open_quantized(folder) as opened:
        for stem, layer in opened.layers.items():
            stored = {name.removeprefix(f"{stem}."): tensors[name] for name in layer.sources}
            assert set(packer.compression_param_names(scheme)) <= stored.keys()
            assert_same_numbers(layer.dequantize(0, layer.shape[0]), packer.decompress(stored, scheme)["weight"])


def test_layers_that_stay_are_ignored_by_them(
    quantization, tiny_pipeline_folder: Path, tmp_path: Path, import_peer
) -> None:  # type: ignore[no-untyped-def]
    from diffusers import ZImageTransformer2DModel

    recipe = Recipe(method="int8", dialect="compressed-tensors", ignored_layers=("layers.0",))
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "ours", recipe)
    folder = tmp_path / "ours" / "transformer"
    config = json.loads((folder / "config.json").read_text())
    model = ZImageTransformer2DModel.from_config({key: config[key] for key in config if key != "quantization_config"})
    apply = import_peer("compressed_tensors.quantization").apply_quantization_config
    apply(model, quantization.QuantizationConfig.model_validate(config["quantization_config"]))
    theirs = {
        name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None) is not None
    }
    with open_quantized(folder) as opened:
        assert theirs == set(opened.layers)
