"""Scales that belong to something else than NAME.weight are applied, or refused with the layer's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.arithmetic.e2m1 import E2M1_VALUES
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CheckpointError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
BLOCKWISE = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}}


def codes(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * 50).to(dtype)


def scales(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7)) * 1e-3 + 1e-4


def write(parent: Path, tensors: dict[str, Tensor], block: dict[str, object] | None) -> Path:
    folder = parent / "model"
    folder.mkdir()
    is_blockwise = block is BLOCKWISE
    linear = {
        f"model.layers.0.self_attn.{part}.{suffix}": tensor.clone()
        for part in ("q_proj", "o_proj")
        for suffix, tensor in {
            "weight": codes(256, 128),
            "weight_scale_inv" if is_blockwise else "weight_scale": scales(2, 1) if is_blockwise else scales(1)[0],
        }.items()
    }
    norm = {"model.norm.weight": torch.ones(128, dtype=torch.bfloat16)}
    save_file({**norm, **(linear if block else {}), **tensors}, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, object] = {
        "architectures": ["SomeMoeForCausalLM"],
        "model_type": "some_moe",
    }
    (folder / "config.json").write_text(json.dumps({**config, **({"quantization_config": block} if block else {})}))
    return folder


def spread(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The scales, one for each element, by blocks of 128."""
    for dimension, size in enumerate(shape):
        count = scale.shape[dimension]
        block = size if count == 1 else 1 if count == size else 128
        scale = scale.repeat_interleave(block, dimension).narrow(dimension, 0, size)
    return scale


CASES = {
    "experts in blocks": (EXPERTS, "_scale_inv", (4, 256, 128), (4, 2, 1), E4M3, BLOCKWISE),
    "last block cut short": (EXPERTS, "_scale_inv", (4, 200, 160), (4, 2, 2), E4M3, BLOCKWISE),
    "scale of each row": (EXPERTS, "_weight_scale", (4, 256, 128), (4, 256, 1), E4M3, COMPRESSED),
    "scale of each column": (EXPERTS, "_weight_scale", (4, 128, 256), (4, 1, 256), E4M3, COMPRESSED),
    "scale of each expert": (EXPERTS, "_weight_scale", (4, 256, 128), (4, 1, 1), E4M3, MODELOPT),
    "E5M2": (EXPERTS, "_scale", (4, 256, 128), (4, 1, 1), E5M2, COMPRESSED),
    "INT8": (EXPERTS, "_weight_scale", (4, 256, 128), (4, 256, 1), torch.int8, MODELOPT),
    "attention, scaled FP8": ("attn.in_proj_weight", "scale_weight", (192, 64), (1, 1), E4M3, COMPRESSED),
    "attention": ("attn.in_proj_weight", "_scale", (192, 64), (192, 1), E4M3, BLOCKWISE),
    "convolution": ("conv.weight", "_scale", (8, 4, 3, 3), (1, 1, 1, 1), E4M3, BLOCKWISE),
    "convolution in 3-D": ("conv.weight", "_scale", (8, 4, 3, 3, 3), (8, 1, 1, 1, 1), E4M3, COMPRESSED),
}


@pytest.mark.parametrize(("name", "ending", "shape", "scale_shape", "dtype", "block"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("method", ["dequantize", "int8"])
def test_the_scale_is_applied(
    tmp_path: Path,
    name: str,
    ending: str,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    dtype: torch.dtype,
    block: dict[str, object],
    method: str,
) -> None:
    weight, scale = codes(*shape, dtype=dtype), scales(*scale_shape)
    scale_name = (name.removesuffix("weight") if not ending.startswith("_") else name) + ending
    stored = scale[0, 0].clone() if ending == "scale_weight" else scale
    model = write(tmp_path, {name: weight, scale_name: stored}, block)

    wanted = weight.float() * spread(scale, shape)
    with open_quantized(model) as quantized:
        layer = next(layer for layer in quantized.layers.values() if layer.stored.weight_name == name)
        assert layer.dequantize(0, shape[0]).view(shape).equal(wanted)
    recipe = Recipe(method=method, runtime="diffusers") if method == "int8" else Recipe(method=method)
    convert_checkpoint(model, tmp_path / "out", recipe)

    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    assert tensors[name].equal(wanted.bfloat16())
    assert scale_name not in tensors
    (verified,) = verify_source(resolve_source(model))
    assert not [finding for finding in verified.findings if finding.severity == "error" and name in finding.layer]


UNREADABLE = {
    "too many scales": ({EXPERTS: codes(4, 256, 128), f"{EXPERTS}_scale_inv": scales(4, 3, 1)}, BLOCKWISE),
    "packed experts": (
        {
            f"{EXPERTS}_blocks": torch.ones(4, 64, 2, 16, dtype=torch.uint8),
            f"{EXPERTS}_scales": torch.ones(4, 64, 2, dtype=torch.uint8),
        },
        BLOCKWISE,
    ),
    "nothing declares them": ({EXPERTS: codes(4, 256, 128), f"{EXPERTS}_weight_scale": scales(4, 1, 1)}, None),
}


@pytest.mark.parametrize(("tensors", "block"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_applied_is_refused_by_every_command(
    tmp_path: Path, tensors: dict[str, Tensor], block: dict[str, object] | None
) -> None:
    model = write(tmp_path, tensors, block)
    for method in ("dequantize", "int8", "keep"):
        with pytest.raises(CheckpointError, match="gate_up_proj"):
            convert_checkpoint(model, tmp_path / method, Recipe(method=method))
    (verified,) = verify_source(resolve_source(model))
    assert any("gate_up_proj" in finding.layer for finding in verified.findings if finding.severity == "error")


def test_keeping_what_no_dialect_spells_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path, {EXPERTS: codes(4, 256, 128), f"{EXPERTS}_scale_inv": scales(4, 2, 1)}, BLOCKWISE)
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*no dialect"):
        convert_checkpoint(model, tmp_path / "out", Recipe(method="keep", dialect="transformers"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=["bytes", "E8M0"])
@pytest.mark.parametrize(
    ("ending", "packed", "block"),
    [("_scale_inv", False, 128), ("_weight_scale", False, 32), ("_scale", True, 32)],
    ids=["blocks", "MXFP8", "MXFP4"],
)
def test_scales_of_experts_may_be_powers_of_two(
    tmp_path: Path, dtype: torch.dtype, ending: str, packed: bool, block: int
) -> None:
    rows = 256 // block if ending == "_scale_inv" else 256
    exponents = torch.randint(110, 125, (4, rows, 128 // block), dtype=torch.uint8)
    scale = torch.exp2(exponents.float() - 127)
    nibbles = torch.randint(0, 16, (4, 256, 128))
    weight = torch.tensor(E2M1_VALUES)[nibbles] if packed else codes(4, 256, 128).float()
    stored = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    tensor = stored.to(torch.uint8) if packed else codes(4, 256, 128)
    name = f"{EXPERTS}_packed" if packed else EXPERTS
    block_of = COMPRESSED | ({"format": "mxfp4-pack-quantized"} if packed else {})
    model = write(tmp_path, {name: tensor, f"{EXPERTS}{ending}": exponents.view(dtype)}, block_of)
    wanted = weight * scale.repeat_interleave(256 // rows, 1).repeat_interleave(block, 2)
    convert_checkpoint(model, tmp_path / "out", Recipe(method="dequantize"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[EXPERTS].float().equal(wanted.bfloat16().float())
    assert tensors.keys().isdisjoint({f"{EXPERTS}{ending}", f"{EXPERTS}_packed"})
    (verified,) = verify_source(resolve_source(model))
    assert not [finding for finding in verified.findings if finding.severity == "error" and EXPERTS in finding.layer]
