"""Checkpoints that only their own tools read are named for what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source, inspection_report
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.errors import CheckpointError

CODES = torch.ones(64, 64, dtype=torch.int8)
STEM = "transformer_blocks.0.attn.to_out.0"
BARE = {"qweight": CODES, "wscales": torch.ones(8, 64)}  # without a branch of low rank
SVDQUANT = {**BARE, "lora_down": torch.ones(128, 32)}  # as FLUX.1 has them
HEADER = {"quantization_config": json.dumps({"method": "svdquant"})}
CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, str], str]] = {
    "Nunchaku without branches": (BARE, None, HEADER, "Nunchaku"),
    "Nunchaku without a header": (SVDQUANT, None, {}, "Nunchaku"),
    "Nunchaku in diffusers": (SVDQUANT, {"quant_method": "nunchaku_lite"}, {}, "Nunchaku"),
    "quanto": ({"weight._data": CODES, "weight._scale": torch.ones(64, 1)}, {"quant_method": "quanto"}, {}, "quanto"),
    "SDNQ": ({"weight": CODES, "scale": torch.ones(64, 1)}, {"quant_method": "sdnq"}, {}, "SDNQ"),
}


@pytest.mark.parametrize(("tensors", "block", "header", "name"), CASES.values(), ids=CASES.keys())
def test_every_command_names_the_tool(
    tmp_path: Path, tensors: dict[str, Tensor], block: dict[str, Any] | None, header: dict[str, str], name: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    stored = {f"{STEM}.{suffix}": tensor.clone() for suffix, tensor in tensors.items()}
    save_file(stored, model / "diffusion_pytorch_model.safetensors", {"format": "pt", **header})
    config = {"_class_name": "QwenImageTransformer2DModel", **({"quantization_config": block} if block else {})}
    (model / "config.json").write_text(json.dumps(config))
    for method in ("fp8", "keep", "dequantize"):
        with pytest.raises(CheckpointError, match=name):
            convert_checkpoint(model, tmp_path / method, Recipe(method=method))
    (verified,) = verify_source(resolve_source(model))
    assert any(name in finding.what for finding in verified.findings if finding.severity == "error")
    (inspected,) = inspect_source(resolve_source(model))
    assert name in inspected.dialect
    assert {verdict.outcome for verdict in inspected.runtimes} <= {"refuses", "wrong"}
    assert name in next(inspection_report(resolve_source(model), [inspected], as_json=False))


PICKLES = {
    "torchao": ("diffusion_pytorch_model.bin", {"quant_method": "torchao"}, "torchao 0.15"),
    "ModelOpt in diffusers": ("diffusion_pytorch_model.bin", {"quant_method": "modelopt"}, "export_hf_checkpoint"),
    "plain": ("diffusion_pytorch_model.bin", None, "save_pretrained"),
    "Wan's own repository": ("Wan2.1_VAE.pth", None, "-Diffusers"),
    "Wan's own encoder": ("models_t5_umt5-xxl-enc-bf16.pth", None, "-Diffusers"),
}


@pytest.mark.parametrize(("file", "block", "message"), PICKLES.values(), ids=PICKLES.keys())
def test_pickles_are_named_with_a_remedy(tmp_path: Path, file: str, block: dict[str, Any] | None, message: str) -> None:
    (tmp_path / file).write_bytes(b"\x80\x02")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block} if block else {}))
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path, tmp_path.with_name("out"), Recipe())


def test_the_class_of_wans_own_code_is_named(tmp_path: Path) -> None:
    save_file({"blocks.0.ffn.0.weight": torch.ones(8, 8)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
    with pytest.raises(CheckpointError, match=r"WanModel.*-Diffusers"):
        convert_checkpoint(tmp_path, tmp_path.with_name("wan-out"), Recipe())
