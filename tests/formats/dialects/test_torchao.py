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


@pytest.mark.parametrize("config", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_what_torchao_writes(import_peer: Callable[[str], ModuleType], tmp_path: Path, config: str) -> None:
    quantization = import_peer("torchao.quantization")
    support = import_peer("torchao.prototype.safetensors.safetensors_support")
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(128, 64, bias=False)})])})
    model = model.bfloat16()
    options = {"version": 2} if config.startswith("Int8") else {}
    if config.startswith("Intx"):
        granularity = import_peer("torchao.quantization.granularity").PerGroup(32)
        options = {"weight_dtype": torch.int4, "granularity": granularity}
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


@pytest.mark.parametrize("is_smoothed", [False, True], ids=["plain", "smoothed"])
def test_plain_int4(import_peer: Callable[[str], ModuleType], tmp_path: Path, *, is_smoothed: bool) -> None:
    """Packed and flattened by torchao: the zero point is added to the scaled code."""
    kind = import_peer("torchao.quantization").Int4Tensor
    support = import_peer("torchao.prototype.safetensors.safetensors_support")
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (64, 128), generator=draw, dtype=torch.int8)
    scale, zero = (torch.rand(4, 64, generator=draw).bfloat16() / 100 for _ in range(2))
    factors = torch.rand(128, generator=draw).bfloat16() + 0.5 if is_smoothed else None
    packed = (codes[:, ::2] & 0xF) | (codes[:, 1::2] << 4)
    weight = kind(packed, scale, zero, [1, 32], torch.Size((64, 128)), factors)
    tensors, header = support.flatten_tensor_state_dict({f"{STEM}.weight": weight})
    wanted = codes * scale.T.float().repeat_interleave(32, 1) + zero.T.float().repeat_interleave(32, 1)
    wanted = wanted if factors is None else wanted * factors.float()
    check(write(tmp_path / "model", tensors, header), tmp_path / "out", wanted)


@pytest.mark.parametrize("kind", ["Int8Tensor", "IntxUnpackedToInt8Tensor"])
def test_smoothed_inputs_are_multiplied_in(tmp_path: Path, kind: str) -> None:
    codes, scale = torch.randint(-128, 128, (64, 128)).to(torch.int8), torch.rand(64, 1) / 100
    factors = torch.rand(128) + 0.5
    static = {"act_quant_scale": torch.ones(1), "act_quant_zero_point": torch.zeros(1)}
    model = write(tmp_path / "model", *described(kind, qdata=codes, scale=scale, act_pre_scale=factors, **static))
    check(model, tmp_path / "out", codes * scale * factors)


def test_a_part_of_unknown_meaning_is_refused(tmp_path: Path) -> None:
    parts = {"qdata": CODES, "scale": torch.ones(64, 1), "row_scale": torch.full((64, 1), 2.0)}
    model = write(tmp_path / "model", *described("Float8Tensor", **parts))
    with pytest.raises(CheckpointError, match="row_scale"):
        convert_checkpoint(model, tmp_path / "out", Recipe(method="dequantize"))
