"""Integers in words, as GPTQ, AWQ and AutoRound pack them."""

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
from omni_convert.formats.errors import CheckpointError

ROWS, COLUMNS, GROUP = 64, 128, 64
STEM = "model.layers.0.mlp.gate_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_BLOCK = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
AWQ_BLOCK = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
ROUND_BLOCK = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "data_type": "int"}


def numbers(bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, columns], zero points and scales [rows, groups]."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=generator)
    zeros = torch.randint(1, 1 << bits, (ROWS, COLUMNS // GROUP), generator=generator)
    return codes, zeros, (torch.rand(ROWS, COLUMNS // GROUP, generator=generator) / 64 + 0.001).half()


def words(codes: Tensor, bits: int = 4, order: tuple[int, ...] | None = None) -> Tensor:
    """Packs consecutive columns, in that order."""
    per_word = 32 // bits
    parts = codes.reshape(len(codes), -1, per_word)[..., list(order or range(per_word))].to(torch.int64)
    packed = sum(parts[..., place] << (bits * place) for place in range(per_word))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq(bits: int = 4, offset: int = 1, **others: Tensor) -> dict[str, Tensor]:
    codes, zeros, scales = numbers(bits)
    return {
        "qweight": words(codes, bits).T,
        "qzeros": words((zeros - offset).T, bits),
        "scales": scales.T,
        **others,
    }


def awq() -> dict[str, Tensor]:
    codes, zeros, scales = numbers()
    return {"qweight": words(codes.T, order=AWQ_ORDER), "qzeros": words(zeros.T, order=AWQ_ORDER), "scales": scales.T}


def write(folder: Path, tensors: dict[str, Tensor], block: dict[str, Any]) -> Path:
    stored = {f"{STEM}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    folder.mkdir()
    save_file({**stored, "model.norm.weight": torch.ones(COLUMNS)}, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


IDENTITY = (torch.arange(COLUMNS) // GROUP).to(torch.int32)
READ = {
    "GPTQ": (gptq(), GPTQ_BLOCK, 4),
    "GPTQ with g_idx": (gptq(g_idx=IDENTITY), GPTQ_BLOCK, 4),
    "GPTQ v2": (gptq(offset=0), {**GPTQ_BLOCK, "checkpoint_format": "gptq_v2"}, 4),
    "GPTQ of 8 bits": (gptq(8), {**GPTQ_BLOCK, "bits": 8}, 8),
    "AWQ": (awq(), AWQ_BLOCK, 4),
    "AutoRound in AWQ's packing": (awq(), {**ROUND_BLOCK, "packing_format": "auto_round:auto_awq"}, 4),
    "AutoRound, 8 bits by name": (gptq(8), {**ROUND_BLOCK, "extra_config": {STEM: {"bits": 8}}}, 8),
    "AutoRound, 8 bits by pattern": (gptq(8), {**ROUND_BLOCK, "extra_config": {".*gate_proj": {"bits": 8}}}, 8),
}


@pytest.mark.parametrize(("tensors", "block", "bits"), READ.values(), ids=READ.keys())
def test_values(tmp_path: Path, tensors: dict[str, Tensor], block: dict[str, Any], bits: int) -> None:
    codes, zeros, scales = numbers(bits)
    wanted = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
    model = write(tmp_path / "model", tensors, block)
    with open_quantized(model) as quantized:
        layer = quantized.layers[STEM]
        assert layer.dequantize(0, ROWS).equal(wanted)
        assert layer.dequantize(3, 21).equal(wanted[3:21])  # across words
    convert_checkpoint(model, tmp_path / "out", Recipe(method="dequantize"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == {f"{STEM}.weight", "model.norm.weight"}
    assert stored[f"{STEM}.weight"].equal(wanted.bfloat16())


REFUSED = {
    "reordered columns": (gptq(g_idx=IDENTITY.flip(0).contiguous()), GPTQ_BLOCK, "desc_act"),
    "3 bits": (gptq(), {**GPTQ_BLOCK, "bits": 3}, "2, 4 or 8"),
    "another packing of AWQ": (awq(), {**AWQ_BLOCK, "version": "gemv"}, "gemm"),
}


@pytest.mark.parametrize(("tensors", "block", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_other_packings_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], block: dict[str, Any], message: str
) -> None:
    model = write(tmp_path / "model", tensors, block)
    with pytest.raises(CheckpointError, match=f"{STEM}.*{message}"):
        convert_checkpoint(model, tmp_path / "out", Recipe(method="dequantize"))
