"""Weights cast to FP8 without scales are the numbers that they are, for every command; codes without scales are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.views.base import dequantized_view

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "layers.0.attention.to_q.weight"


def cast_pipeline(original: Path, folder: Path, dtype: torch.dtype, least: int = 2) -> dict[str, Tensor]:
    """A pipeline whose transformer is cast; returns what its tensors are worth."""
    shutil.copytree(original, folder)
    file = folder / "transformer" / WEIGHTS
    tensors = {name: tensor.to(dtype) if tensor.dim() >= least else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return {name: tensor.float() for name, tensor in tensors.items()}


def values(folder: Path) -> dict[str, Tensor]:
    with open_quantized(folder / "transformer") as opened:
        view = dequantized_view(opened)
        return {name: view.read(name).float() for name in view}


@pytest.mark.parametrize("least", [2, 1], ids=["matrices", "everything"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("method", "limit"), [("dequantize", 0.0), ("int8", 0.02), ("fp8", 0.04), ("mxfp8", 0.04), ("gguf", 0.01)]
)
def test_casts_are_read_as_their_numbers(
    method: str, limit: float, dtype: torch.dtype, least: int, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    worth = cast_pipeline(tiny_pipeline_folder, tmp_path / "model", dtype, least)
    recipe = Recipe(method, **({"gguf_names": "diffusers"} if method == "gguf" else {}))
    convert_checkpoint(tmp_path / "model", tmp_path / "out", recipe)
    written = values(tmp_path / "out")
    assert written.keys() == worth.keys()
    for name, expected in worth.items():
        error = float((written[name].reshape(expected.shape) - expected).norm() / expected.norm().clamp(min=1e-9))
        assert error <= limit, name


def test_all_that_a_cast_leaves_is_bf16(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    cast_pipeline(tiny_pipeline_folder, tmp_path / "model", torch.float8_e4m3fn, 1)
    convert_checkpoint(tmp_path / "model", tmp_path / "out", Recipe(ignored_layers=("layers.0",)))
    written = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert written[LAYER].dtype is torch.bfloat16
    assert {tensor.dtype for name, tensor in written.items() if tensor.dtype.itemsize == 1} == {torch.float8_e4m3fn}
    assert f"{LAYER}_scale" not in written


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("method", ["dequantize", "fp8"])
def test_codes_that_lost_their_scale_are_refused(
    method: str, dtype: torch.dtype, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / WEIGHTS
    top = torch.finfo(dtype).max
    tensors = {
        name: (tensor / tensor.abs().max() * top).to(dtype) if "attention" in name and tensor.dim() == 2 else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"as codes have, and no scale; restore the scales"):
        convert_checkpoint(tmp_path / "model", tmp_path / "out", Recipe(method))


@pytest.mark.parametrize("method", ["dequantize", "fp8"])
def test_inf_in_a_cast_is_refused(method: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    cast_pipeline(tiny_pipeline_folder, tmp_path / "model", torch.float8_e5m2)
    file = tmp_path / "model" / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[LAYER].view(torch.uint8)[3, 5] = 0x7C
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor '{LAYER}': found NaN or Inf"):
        convert_checkpoint(tmp_path / "model", tmp_path / "out", Recipe(method))


@pytest.mark.parametrize("stem", ["layers.0.attention.qkv", "layers.1.feed_forward.w2"])
@pytest.mark.parametrize("method", ["dequantize", "fp8", "keep"])
def test_a_layer_without_a_mark_beside_marked_ones_is_refused(
    method: str, stem: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "model", Recipe("fp8", dialect="comfyui"))
    file = tmp_path / "model" / "transformer" / WEIGHTS
    tensors = load_file(file)
    del tensors[f"{stem}.comfy_quant"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"layer '{stem}': found F8_E4M3 codes with weight_scale"):
        convert_checkpoint(tmp_path / "model", tmp_path / "out", Recipe(method))
