"""Files for ComfyUI have the names of the models' own code, merged layers and all; every command reads them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.convert.cli.main import main
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Model → tensors by which ComfyUI tells it, and a merged or renamed layer with the parts that it has in diffusers.
EXPECTED = {
    "flux_1": (
        ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", "guidance_in.in_layer.weight"),
        "single_blocks.0.linear1",
        [*(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"), "single_transformer_blocks.0.proj_mlp"],
    ),
    "flux_2": (
        ("double_stream_modulation_img.lin.weight", "img_in.weight"),
        "double_blocks.0.txt_attn.qkv",
        [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
    ),
    "chroma": (
        ("distilled_guidance_layer.norms.0.scale", "double_blocks.0.img_attn.norm.key_norm.scale"),
        "double_blocks.0.img_attn.qkv",
        [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    ),
    "z_image": (
        ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight", "cap_pad_token"),
        "layers.1.attention.qkv",
        [f"layers.1.attention.to_{part}" for part in "qkv"],
    ),
    "lumina_2": (
        ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
        "layers.0.attention.qkv",
        [f"layers.0.attn.to_{part}" for part in "qkv"],
    ),
    "qwen_image": (
        ("txt_norm.weight",),
        "transformer_blocks.0.attn.to_q",
        ["transformer_blocks.0.attn.to_q"],
    ),
    "hidream_i1": (
        ("caption_projection.0.linear.weight",),
        "single_stream_blocks.0.block.attn1.to_k",
        ["single_stream_blocks.0.block.attn1.to_k"],
    ),
    "wan_i2v": (
        ("head.modulation", "blocks.0.ffn.0.weight", "img_emb.proj.0.bias"),
        "blocks.0.cross_attn.k_img",
        ["blocks.0.attn2.add_k_proj"],
    ),
    "wan_vace": (
        ("head.modulation", "vace_patch_embedding.weight"),
        "vace_blocks.0.self_attn.o",
        ["vace_blocks.0.attn1.to_out.0"],
    ),
    "wan_animate": (
        ("head.modulation", "motion_encoder.enc.net_app.convs.1.conv2.2.bias"),
        "face_adapter.fuser_blocks.0.linear1_kv",
        ["face_adapter.0.to_k", "face_adapter.0.to_v"],
    ),
    "ltx_video": (
        ("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight"),
        "transformer_blocks.0.attn2.to_v",
        ["transformer_blocks.0.attn2.to_v"],
    ),
    "ltx_2": (
        ("adaln_single.emb.timestep_embedder.linear_1.bias", "audio_adaln_single.linear.weight"),
        "transformer_blocks.0.audio_attn1.to_q",
        ["transformer_blocks.0.audio_attn1.to_q"],
    ),
    "hunyuan_video": (
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "vector_in.in_layer.weight"),
        "single_blocks.0.linear1",
        [*(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"), "single_transformer_blocks.0.proj_mlp"],
    ),
    "hunyuan_video_15": (
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "cond_type_embedding.weight"),
        "double_blocks.0.img_attn_qkv",
        [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    ),
    "sd3": (
        ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed"),
        "joint_blocks.0.x_block.attn.qkv",
        [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    ),
    "krea_2": (
        ("txtfusion.projector.weight", "first.weight", "blocks.0.mod.lin"),
        "blocks.0.attn.wq",
        ["transformer_blocks.0.attn.to_q"],
    ),
    "sdxl": (
        ("input_blocks.0.0.weight", "label_emb.0.0.weight", "out.2.weight"),
        "middle_block.1.transformer_blocks.0.attn1.to_q",
        ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
    ),
    "sd_15": (
        ("input_blocks.0.0.weight", "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight"),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"],
    ),
}


@pytest.fixture(scope="module", params=EXPECTED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and a folder with a tiny model of it."""
    folder = tmp_path_factory.mktemp("models") / str(request.param)
    tiny_models.save_model(request.param, folder)
    return request.param, folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12))


def test_a_file_has_comfyuis_names_and_stands_for_the_model(model: tuple[str, Path], tmp_path: Path) -> None:
    name, source = model
    detected_by, layer, parts = EXPECTED[name]
    convert_checkpoint(source, tmp_path / "out", Recipe(dialect="comfyui", device="cpu"))
    tensors, plain = load_file(tmp_path / "out" / WEIGHTS), load_file(source / WEIGHTS)
    assert tensors.keys() >= {*detected_by}
    assert json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
    assert tensors[f"{layer}.weight_scale"].shape == ()  # one for all parts
    whole = torch.cat([plain[f"{part}.weight"] for part in parts])
    with open_quantized(tmp_path / "out") as opened:
        assert relative_error(opened.layers[layer].dequantize(0, len(whole)), whole) < 0.03
    (verified,) = verify_source(resolve_source(tmp_path / "out"), resolve_source(source))
    assert verified.findings == ()
    assert len(verified.errors) >= verified.layers > 0
    shown = run("inspect", tmp_path / "out").output
    assert "ComfyUI: loads" in shown
    run("dequantize", tmp_path / "out", "-o", tmp_path / "back")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == plain.keys()
    quantized = {f"{stem}.weight" for stem in verified.errors}
    for tensor, values in plain.items():
        error = relative_error(back[tensor], values)
        assert error < 0.03 if tensor in quantized else back[tensor].equal(values), tensor


@pytest.mark.slow
def test_a_quantized_model_is_kept_under_comfyuis_names_without_a_change(
    model: tuple[str, Path], tmp_path: Path
) -> None:
    name, source = model
    detected_by, layer, _ = EXPECTED[name]
    convert_checkpoint(source, tmp_path / "int8", Recipe("int8", runtime="diffusers", device="cpu"))
    convert_checkpoint(tmp_path / "int8", tmp_path / "kept", Recipe("keep", dialect="comfyui"))
    tensors = load_file(tmp_path / "kept" / WEIGHTS)
    assert tensors.keys() >= {*detected_by}
    assert json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
    for folder in ("int8", "kept"):
        run("dequantize", tmp_path / folder, "-o", tmp_path / f"{folder} back", "--quiet")
    found, wanted = (load_file(tmp_path / f"{folder} back" / WEIGHTS) for folder in ("kept", "int8"))
    assert found.keys() == wanted.keys()
    assert all(tensor.equal(wanted[key]) for key, tensor in found.items())
