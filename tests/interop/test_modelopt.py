"""ModelOpt's own export of a diffusers model, read by us."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4

SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")
CONFIGS = {
    "FP8_DEFAULT_CFG": "fp8 static",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8 per row",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "fp8 128x128",
    "NVFP4_DEFAULT_CFG": "nvfp4",
    "W4A16_NVFP4_CFG": "nvfp4",
    "MXFP8_DEFAULT_CFG": "mxfp8",
    "MXFP4_DEFAULT_CFG": "mxfp4",
    "INT8_DEFAULT_CFG": "int8 per row",
    "INT8_WEIGHT_ONLY_CFG": "int8",
    "INT8_SMOOTHQUANT_CFG": "int8 per row, smoothed",
}


def tiny_flux(width: int = 32):  # type: ignore[no-untyped-def]  # a diffusers model
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=2 * width,
            pooled_projection_dim=width,
            guidance_embeds=False,
            num_attention_heads=4,
            attention_head_dim=32,
            axes_dims_rope=(8, 12, 12),
            in_channels=width,
        ).to(torch.bfloat16)


def run(model, width: int = 32) -> None:  # type: ignore[no-untyped-def]  # as above
    draw = torch.Generator().manual_seed(1)
    model(
        hidden_states=torch.randn(1, 16, width, generator=draw).to(model.dtype),
        encoder_hidden_states=torch.randn(1, 8, 2 * width, generator=draw).to(model.dtype),
        pooled_projections=torch.randn(1, width, generator=draw).to(model.dtype),
        timestep=torch.tensor([0.5]).to(model.dtype),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
    )


def unpacked_by_them(import_peer, parts) -> Tensor:  # type: ignore[no-untyped-def]  # suffix to tensor
    """The weight in float32, by the class that their quantizers dequantize with, for inputs as they come."""
    packed = import_peer("modelopt.torch.quantization.qtensor")
    codes, scale, overall = parts["weight"], parts["weight_scale"], parts.get("weight_scale_2")
    pack = {torch.int8: packed.INT8QTensor, torch.float8_e4m3fn: packed.FP8QTensor}.get(codes.dtype)
    shape = codes.shape
    sizes: dict[str, object] = {}
    if pack is None:
        shape = torch.Size((len(codes), 2 * codes.shape[1]))
        pack = packed.MXFP4QTensor if overall is None else packed.NVFP4QTensor
        sizes = {"block_sizes": {-1: 32 if overall is None else 16}, "double_scale": overall}
    elif scale.dtype is torch.uint8:
        pack = packed.MXFP8QTensor
    elif scale.dim() == 4:
        scale, sizes = scale[:, 0, :, 0], {"block_sizes": {0: 128, 1: 128}}
    elif scale.dim():
        scale = scale.reshape(-1, 1)
    weight = pack(shape, torch.float32, codes).dequantize(scale=scale, **sizes)
    # What their input quantizer multiplies inputs with, the weight may be multiplied with instead.
    return weight * parts["pre_quant_scale"] if "pre_quant_scale" in parts else weight


def parts_of(tensors: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    return {suffix: tensors[name] for suffix in SUFFIXES if (name := f"{stem}.{suffix}") in tensors}


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
    assert ours.equal(unpacked_by_them(import_peer, parts_of(tensors, layer)))
    convert_checkpoint(tmp_path / "theirs", tmp_path / "float", Recipe(method="dequantize"))
    reloaded = type(model).from_pretrained(tmp_path / "float", torch_dtype=torch.bfloat16)
    assert reloaded.get_submodule(layer).weight.equal(ours.to(torch.bfloat16))


@pytest.mark.slow
def test_smoothing_is_undone_as_in_their_forward_pass(import_peer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    quantization = import_peer("modelopt.torch.quantization")
    export = import_peer("modelopt.torch.export")
    draw = torch.Generator().manual_seed(2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # theirs
        model = tiny_flux().float()
        quantization.quantize(model, quantization.INT8_SMOOTHQUANT_CFG, run)
        linears = {name: linear for name, linear in model.named_modules() if hasattr(linear, "weight_quantizer")}
        for linear in linears.values():
            linear.input_quantizer.disable_quant()  # it goes on smoothing
        inputs = {name: torch.randn(4, linear.in_features, generator=draw) for name, linear in linears.items()}
        outputs = {name: linear(inputs[name]) - linear.bias for name, linear in linears.items()}
        export.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    with open_quantized(tmp_path / "theirs") as opened:
        assert len(opened.layers) > 20
        for stem, layer in opened.layers.items():
            ours = inputs[stem] @ layer.dequantize(0, layer.shape[0]).T
            # Of ties between two codes, their exporter rounds some otherwise than their forward pass.
            assert (ours - outputs[stem]).norm() < 2**-10 * outputs[stem].norm()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG"])
def test_their_exports_that_are_not_read_are_refused(import_peer, tmp_path: Path, config: str) -> None:  # type: ignore[no-untyped-def]
    quantization = import_peer("modelopt.torch.quantization")
    export = import_peer("modelopt.torch.export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = tiny_flux(128)
        quantization.quantize(model, getattr(quantization, config), lambda model: run(model, 128))
        export.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="context_embedder"):
        open_quantized(tmp_path / "theirs")


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
            theirs = unpacked_by_them(import_peer, parts_of(tensors, stem))
            assert layer.dequantize(0, layer.shape[0]).equal(theirs)


FORMATS: dict[str, Format] = {
    "FP8": Fp8(static=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8(),
    "MXFP8": Mxfp8(),
    "NVFP4": Nvfp4(static=True),
    "W4A16_NVFP4": Nvfp4(),
}
GROUP_SIZES = {"MXFP8": 32, "NVFP4": 16, "W4A16_NVFP4": 16}


def without_nothing(value: Any) -> Any:
    """Without keys that say null, and in any order of groups."""
    if not isinstance(value, dict):
        return value
    if "config_groups" in value:
        value = value | {"config_groups": {str(group["targets"]): group for group in value["config_groups"].values()}}
    return {key: without_nothing(inner) for key, inner in value.items() if inner is not None}


@pytest.mark.parametrize("algorithm", [*FORMATS, "MIXED_PRECISION"])
def test_our_block_is_that_of_their_exporter(import_peer, algorithm: str) -> None:  # type: ignore[no-untyped-def]
    convert = import_peer("modelopt.torch.export.convert_hf_config").convert_hf_quant_config_format
    is_mixed = algorithm in ("MIXED_PRECISION", "MXFP8")  # vLLM-Omni reads MXFP8 in a mixture alone
    layers = {f"blocks.{name}": name for name in FORMATS} if algorithm not in FORMATS else {"blocks.0": algorithm}
    described = {
        stem: {"quant_algo": name, **({"group_size": GROUP_SIZES[name]} if name in GROUP_SIZES else {})}
        for stem, name in layers.items()
    }
    quantization = {"quantized_layers": described} if is_mixed else {"group_size": GROUP_SIZES.get(algorithm, 0)}
    name = "MIXED_PRECISION" if is_mixed else algorithm
    theirs = convert({"quantization": {"quant_algo": name, "exclude_modules": [], **quantization}})
    ours = DIALECTS["modelopt"].block({stem: FORMATS[name] for stem, name in layers.items()}, [])
    assert ours is not None
    assert ours.pop("producer") == {"name": "omni-convert"}
    if algorithm == "W4A16_NVFP4":  # vLLM-Omni takes the shorter name for it where inputs are null
        assert ours["config_groups"]["group_0"]["input_activations"] is None
        theirs["quant_algo"] = "NVFP4"
    assert without_nothing(ours) == without_nothing(theirs)
