"""Checkpoints of bitsandbytes, against the bytes and numbers that its own code gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CheckpointError

STEM = "model.layers.0.mlp.gate_proj"
NF4 = (
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
)  # fmt: skip
FP4 = (0, 0.0052083334885537624, 0.6666666865348816, 1, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
TABLES = {"nf4": NF4, "fp4": (*FP4, *(-value for value in FP4))}
# W = BF16(sin(0.37 i) (1 + i % 7)), [2, 64], as bitsandbytes 0.50.2 stores it.
GOLDEN = {
    "nf4": "78adeee88642106557adf9abb952643224789bdeed7652100667acef9aa85215"
    "43347c8acddc97532111679ceff898631054457be9bccb95643212478bdeee87",
    "fp4": "0675222119cdabeee175367446edefdddc1164522519fdabbee175236776edae"
    "fccf1467555569ecdaaa9164233661ecabeffe142645546f9fddadc164523211",
}
ERRORS = {"nf4": 0.09277, "fp4": 0.1260}


def state(kind: str, shape: tuple[int, int], block: int = 64, **others: Any) -> Tensor:
    text = json.dumps({"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape), **others})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def write(folder: Path, tensors: dict[str, Tensor], **block: Any) -> Path:
    folder.mkdir()
    stored = {f"{STEM}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    save_file({**stored, "model.norm.weight": torch.ones(8)}, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    quantization = {"quant_method": "bitsandbytes", **block}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def assert_dequantizes_to(model: Path, wanted: Tensor) -> None:
    """Checks what is read, in parts too, and what `dequantize` and `verify` make of it."""
    rows = len(wanted)
    with open_quantized(model) as quantized:
        layer = quantized.layers[STEM]
        torch.testing.assert_close(layer.dequantize(0, rows), wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.dequantize(1, rows), wanted[1:], rtol=1e-6, atol=0)
    (verified,) = verify_source(resolve_source(model))
    assert not [finding for finding in verified.findings if finding.severity == "error" and STEM in finding.layer]
    convert_checkpoint(model, model.parent / "out", Recipe(method="dequantize"))
    stored = load_file(model.parent / "out" / "model.safetensors")
    assert stored.keys() == {f"{STEM}.weight", "model.norm.weight"}
    torch.testing.assert_close(stored[f"{STEM}.weight"].float(), wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", TABLES)
def test_golden_bytes(tmp_path: Path, kind: str) -> None:
    index = torch.arange(128, dtype=torch.float64)
    original = (torch.sin(0.37 * index) * (1 + index % 7)).bfloat16().float().view(2, 64)
    codes = torch.tensor(list(bytes.fromhex(GOLDEN[kind])), dtype=torch.uint8).view(-1, 1)
    absmax = torch.tensor([6.96875, 6.8125])
    tensors = {
        "weight": codes,
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(TABLES[kind]),
        f"weight.quant_state.bitsandbytes__{kind}": state(kind, (2, 64)),
    }
    model = write(tmp_path / "model", tensors, load_in_4bit=True)
    with open_quantized(model) as quantized:
        found = quantized.layers[STEM].dequantize(0, 2)
    error = float((found - original).norm() / original.norm())
    assert math.isclose(error, ERRORS[kind], rel_tol=1e-3)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("shape", "block"), [((8, 128), 64), ((8, 96), 64), ((512, 64), 64), ((8, 64), 128)], ids=str)
def test_values(tmp_path: Path, shape: tuple[int, int], block: int, nested: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    elements, blocks = math.prod(shape), math.prod(shape) // block
    numbers = torch.randint(0, 16, (elements,), generator=generator)
    tensors = {"weight": ((numbers[::2] << 4) | numbers[1::2]).to(torch.uint8).view(-1, 1)}
    tensors["weight.quant_map"] = torch.tensor(TABLES["nf4"])
    others: dict[str, Any] = {}
    if nested:
        small = torch.randint(0, 256, (blocks,), generator=generator)
        table = torch.linspace(-1, 1, 256)
        large = torch.rand(-(-blocks // 256), generator=generator) * 0.01
        absmax = table[small] * large[torch.arange(blocks) // 256] + 0.1
        tensors |= {"weight.absmax": small.to(torch.uint8), "weight.nested_absmax": large}
        tensors["weight.nested_quant_map"] = table
        others = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    else:
        absmax = tensors["weight.absmax"] = torch.rand(blocks, generator=generator) + 0.1
    tensors["weight.quant_state.bitsandbytes__nf4"] = state("nf4", shape, block, **others)
    wanted = torch.tensor(TABLES["nf4"])[numbers] * absmax.repeat_interleave(block)
    assert_dequantizes_to(write(tmp_path / "model", tensors, load_in_4bit=True), wanted.view(shape))


def test_int8(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (8, 64), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    largest = torch.rand(8) + 0.1
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    wanted = codes.float() * (largest / 127)[:, None]
    assert_dequantizes_to(write(tmp_path / "model", tensors, load_in_8bit=True), wanted)


BROKEN = {
    "no state": lambda tensors: tensors.pop("weight.quant_state.bitsandbytes__nf4"),
    "state is no JSON": lambda tensors: tensors.update({"weight.quant_state.bitsandbytes__nf4": torch.ones(4).byte()}),
    "no absmax": lambda tensors: tensors.pop("weight.absmax"),
    "absmax too short": lambda tensors: tensors.update({"weight.absmax": torch.ones(3)}),
    "no table": lambda tensors: tensors.pop("weight.quant_map"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_broken_layers_are_refused_by_name(tmp_path: Path, change: Any) -> None:
    tensors = {
        "weight": torch.ones(8 * 64 // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(8),
        "weight.quant_map": torch.tensor(TABLES["nf4"]),
        "weight.quant_state.bitsandbytes__nf4": state("nf4", (8, 64)),
    }
    change(tensors)
    model = write(tmp_path / "model", tensors, load_in_4bit=True)
    with pytest.raises(CheckpointError, match=STEM):
        convert_checkpoint(model, tmp_path / "out", Recipe(method="dequantize"))
    (verified,) = verify_source(resolve_source(model))
    assert any(STEM in finding.layer for finding in verified.findings if finding.severity == "error")
