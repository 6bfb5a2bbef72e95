"""ModelOpt's own export of a diffusers model, read by us."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.quantized import open_quantized

SUFFIXES = ("weight", "weight_scale", "weight_scale_2")
CONFIGS = {
    "FP8_DEFAULT_CFG": "fp8 static",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8 per row",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "fp8 128x128",
    "NVFP4_DEFAULT_CFG": "nvfp4",
}


def tiny_flux():  # type: ignore[no-untyped-def]  # a diffusers model
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=False,
            num_attention_heads=4,
            attention_head_dim=32,
            axes_dims_rope=(8, 12, 12),
            in_channels=16,
        ).to(torch.bfloat16)


def run(model) -> None:  # type: ignore[no-untyped-def]  # as above
    draw = torch.Generator().manual_seed(1)
    model(
        hidden_states=torch.randn(1, 16, 16, generator=draw).to(torch.bfloat16),
        encoder_hidden_states=torch.randn(1, 8, 64, generator=draw).to(torch.bfloat16),
        pooled_projections=torch.randn(1, 32, generator=draw).to(torch.bfloat16),
        timestep=torch.tensor([0.5]).to(torch.bfloat16),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
    )


def unpacked_by_them(import_peer, parts) -> Tensor:  # type: ignore[no-untyped-def]  # suffix to tensor
    """The weight in float32, by the class that their quantizers dequantize with."""
    packed = import_peer("modelopt.torch.quantization.qtensor")
    codes, scale, overall = parts["weight"], parts["weight_scale"], parts.get("weight_scale_2")
    if scale.dtype is torch.uint8:
        return packed.MXFP8QTensor(codes.shape, torch.float32, codes).dequantize(scale=scale)
    if scale.dim() == 4:
        tensor = packed.FP8QTensor(codes.shape, torch.float32, codes)
        return tensor.dequantize(scale=scale[:, 0, :, 0], block_sizes={0: 128, 1: 128})
    if overall is None:
        tensor = packed.FP8QTensor(codes.shape, torch.float32, codes)
        return tensor.dequantize(scale=scale.reshape(-1, 1) if scale.dim() else scale)
    shape = torch.Size((len(codes), 2 * codes.shape[1]))
    tensor = packed.NVFP4QTensor(shape, torch.float32, codes)
    return tensor.dequantize(scale=scale, double_scale=overall, block_sizes={-1: 16})


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_their_export_is_read(import_peer, tmp_path: Path, config: str) -> None:  # type: ignore[no-untyped-def]
    quantization = import_peer("modelopt.torch.quantization")
    export = import_peer("modelopt.torch.export")
    layer = "single_transformer_blocks.0.proj_mlp"  # of no fused group, whose scales they unify while exporting
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = tiny_flux()
        quantization.quantize(model, getattr(quantization, config), run)
        export.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    with open_quantized(tmp_path / "theirs") as opened:
        assert opened.dialect == "modelopt"
        assert opened.layers[layer].format.label == CONFIGS[config]
        ours = opened.layers[layer].dequantize(0, opened.layers[layer].shape[0])
    tensors = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    assert ours.equal(unpacked_by_them(import_peer, {suffix: tensors.get(f"{layer}.{suffix}") for suffix in SUFFIXES}))
    convert_checkpoint(tmp_path / "theirs", tmp_path / "float", Recipe(method="dequantize"))
    reloaded = type(model).from_pretrained(tmp_path / "float", torch_dtype=torch.bfloat16)
    assert reloaded.get_submodule(layer).weight.equal(ours.to(torch.bfloat16))


@pytest.mark.parametrize("method", ["fp8", "nvfp4", "mxfp8"])
def test_what_we_write_is_dequantized_by_them(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path, method: str
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "ours", Recipe(method=method, dialect="modelopt"))
    folder = tmp_path / "ours" / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    with open_quantized(folder) as opened:
        assert opened.dialect == "modelopt"
        assert opened.layers
        for stem, layer in opened.layers.items():
            parts = {suffix: tensors[name] for suffix in SUFFIXES if (name := f"{stem}.{suffix}") in tensors}
            assert layer.dequantize(0, layer.shape[0]).equal(unpacked_by_them(import_peer, parts))
