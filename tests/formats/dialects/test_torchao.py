"""torchao's tensors in safetensors, as its own code flattens them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.errors import CheckpointError

STEM = "layers.0.proj"


def described(kind: str, **parts: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A tensor as torchao flattens it, without torchao."""
    header = {f"{STEM}.weight": json.dumps({"_type": kind, "_data": {}, "_tensor_data_names": list(parts)})}
    tensors = {f"{STEM}._weight_{name}": part for name, part in parts.items()}
    return tensors, {**header, "tensor_names": json.dumps([f"{STEM}.weight"])}


def write(folder: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> Path:
    folder.mkdir()
    others = {"norm.weight": torch.ones(8)}
    save_file({**tensors, **others}, folder / "diffusion_pytorch_model.safetensors", {"format": "pt", **header})
    block = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig", "_data": {}}}}
    (folder / "config.json").write_text(json.dumps({"_class_name": "SomeModel", "quantization_config": block}))
    return folder


def check(folder: Path, output: Path, wanted: torch.Tensor) -> None:
    (verified,) = verify_source(resolve_source(folder))
    assert not [finding for finding in verified.findings if finding.severity == "error"]
    convert_checkpoint(folder, output, Recipe(method="dequantize"))
    stored = load_file(output / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == {f"{STEM}.weight", "norm.weight"}
    assert stored[f"{STEM}.weight"].equal(wanted.bfloat16())


@pytest.mark.parametrize("config", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig"])
def test_what_torchao_writes(import_peer: Callable[[str], ModuleType], tmp_path: Path, config: str) -> None:
    quantization = import_peer("torchao.quantization")
    support = import_peer("torchao.prototype.safetensors.safetensors_support")
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(128, 64, bias=False)})])})
    model = model.bfloat16()
    options = {"version": 2} if config.startswith("Int8") else {}
    quantization.quantize_(model, getattr(quantization, config)(**options))
    tensors, header = support.flatten_tensor_state_dict(model.state_dict())
    wanted = model.state_dict()[f"{STEM}.weight"].dequantize().float()
    check(write(tmp_path / "model", tensors, header), tmp_path / "out", wanted)


CODES = (torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)
CASES: dict[str, tuple[Any, ...]] = {
    "one scale": (CODES, torch.tensor([[0.01]]), None),
    "row scales": (CODES, torch.rand(64, 1) / 100, None),
    "integers with zero points": (
        CODES.float().to(torch.int8),
        torch.rand(64, 1) / 100,
        torch.full((64, 1), 3).to(torch.int8),
    ),
    "integers in groups": (CODES.float().to(torch.int8), torch.rand(64, 4) / 100, torch.zeros(64, 4, dtype=torch.int8)),
}


@pytest.mark.parametrize(("codes", "scale", "zeros"), CASES.values(), ids=CASES.keys())
def test_values(tmp_path: Path, codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None) -> None:
    width = 128 // scale.shape[1]
    shifted = codes.float() - (0 if zeros is None else zeros.float().repeat_interleave(width, 1))
    parts = {"qdata": codes, "scale": scale, **({} if zeros is None else {"zero_point": zeros})}
    kind = "Int8Tensor" if codes.dtype is torch.int8 else "Float8Tensor"
    model = write(tmp_path / "model", *described(kind, **parts))
    check(model, tmp_path / "out", shifted * scale.repeat_interleave(width, 1))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("Int4TilePackedTo4dTensor", "others are not read"), ("MXTensor", "others are not read"), ("Tensor", "header")],
)
def test_other_tensors_are_named(tmp_path: Path, kind: str, message: str) -> None:
    packed = torch.zeros(64, 64, dtype=torch.uint8)
    model = write(tmp_path / "model", *described(kind, qdata=packed, scale=torch.ones(4, 64)))
    for method in ("dequantize", "int8", "keep"):
        with pytest.raises(CheckpointError, match=f"torchao.*{message}"):
            convert_checkpoint(model, tmp_path / method, Recipe(method=method, runtime="diffusers"))
    (verified,) = verify_source(resolve_source(model))
    assert any("torchao" in finding.what for finding in verified.findings if finding.severity == "error")
