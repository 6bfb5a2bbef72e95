"""ComfyUI's marks say what a weight is worth: in the header, beside the weight, nested; and who wins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_convert.formats.arithmetic.rotation import hadamard
from omni_convert.formats.checks.block import check_block
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.checks.reading import read_tolerantly
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.base import WrittenSpelling
from omni_convert.formats.dialects.comfyui import COMFYUI
from omni_convert.formats.dialects.found import describe
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.table import find_family
from omni_convert.formats.finding import Finding
from omni_convert.formats.schemes.fp8 import Fp8
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4

STEM, GROUP = "blocks.0.proj", 64
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
PLAIN = {"format": "int8_tensorwise"}
NESTED = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": GROUP}}


def weight() -> Tensor:
    return torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.05


def rotated(values: Tensor) -> Tensor:
    return (values.view(len(values), -1, GROUP) @ hadamard(GROUP)).flatten(1)


def mark(content: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def file(
    path: Path,
    fmt: Int8 | Fp8,
    beside: Mapping[str, Any] | None,
    header: Mapping[str, Any] | None = None,
    values: Tensor | None = None,
) -> Path:
    tensors = {f"{STEM}.{leaf}": each for leaf, each in fmt.quantize(weight() if values is None else values).items()}
    if beside is not None:
        tensors[f"{STEM}.comfy_quant"] = mark(beside)
    metadata = {} if header is None else {"_quantization_metadata": json.dumps({"layers": header})}
    save_file(tensors, path / "x.safetensors", metadata)
    return path / "x.safetensors"


def read(path: Path) -> Tensor:
    with open_quantized(path) as opened:
        assert opened.dialect == "comfyui"
        return opened.layers[STEM].dequantize(0, 96)


def findings(path: Path) -> list[Finding]:
    with Checkpoint.open(path) as checkpoint:
        reading = read_tolerantly(describe(checkpoint, path.parent))
        return [*reading.findings, *check_block(reading, {})]


@pytest.mark.parametrize(
    ("beside", "header"),
    [
        (ROTATED, None),
        (NESTED, None),
        ({**PLAIN, "convrot": True, "params": {"convrot_groupsize": GROUP}}, None),
        ({**ROTATED, "params": {"convrot_groupsize": GROUP, "per_row": True}}, None),
        (None, {STEM: ROTATED}),
        (None, {STEM: NESTED}),
        (PLAIN, {STEM: ROTATED}),
        (NESTED, {STEM: ROTATED}),
    ],
    ids=["flat", "nested", "half", "both", "header", "nested header", "header wins", "header agrees"],
)
def test_a_rotated_weight_is_turned_back_wherever_the_mark_says_so(tmp_path: Path, beside: Any, header: Any) -> None:
    got = read(file(tmp_path, Int8(), beside, header, rotated(weight())))
    fmt = Int8()
    expected = rotated(fmt.dequantize(fmt.quantize(rotated(weight()))))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert float((got - weight()).norm() / weight().norm()) < 0.02


@pytest.mark.parametrize(
    ("fmt", "beside", "header"),
    [
        (Int8(), ROTATED, {STEM: PLAIN}),
        (Int8(), {**PLAIN, "convrot": False}, None),
        (Int8(), {**PLAIN, "params": {"convrot": False}}, None),
        (Int8(), {**PLAIN, "params": {"per_row": True, "convrot_groupsize": GROUP}}, None),
        (Fp8(), {"format": "float8_e4m3fn", "params": {"full_precision_matrix_mult": True}}, None),
    ],
    ids=["header without rotation wins", "not rotated", "not rotated, nested", "a size alone", "fp8 with params"],
)
def test_no_weight_is_turned_that_the_reader_does_not_turn(
    tmp_path: Path, fmt: Int8 | Fp8, beside: Any, header: Any
) -> None:
    assert read(file(tmp_path, fmt, beside, header)).equal(fmt.dequantize(fmt.quantize(weight())))


@pytest.mark.parametrize(
    ("fmt", "content"),
    [
        (Int8(), {**ROTATED, "params": {"convrot": False}}),
        (Int8(), {**ROTATED, "params": {"convrot_groupsize": 256}}),
        (Int8(), {**PLAIN, "convrot": False, "params": {"convrot": True}}),
        (Int8(), {**PLAIN, "convrot": "false"}),
        (Fp8(), {"format": "float8_e4m3fn", "convrot": True}),
        (Fp8(), {"format": "float8_e4m3fn", "params": {"convrot": True}}),
    ],
    ids=["flat and nested", "two sizes", "nested alone", "no boolean", "fp8", "fp8, nested"],
)
@pytest.mark.parametrize("place", ["beside", "header"])
def test_a_rotation_that_readers_may_take_either_way_is_refused(
    tmp_path: Path, fmt: Int8 | Fp8, content: Mapping[str, Any], place: str
) -> None:
    path = file(tmp_path, fmt, content) if place == "beside" else file(tmp_path, fmt, None, {STEM: content})
    with pytest.raises(CheckpointError, match=r"found (convrot|another rotation)"):
        open_quantized(path)
    assert [(each.severity, each.check, each.layer) for each in findings(path)] == [("error", "bad-mark", STEM)]


@pytest.mark.parametrize(
    ("fmt", "beside", "header", "severity"),
    [
        (Int8(), PLAIN, {STEM: ROTATED}, "error"),
        (Int8(), {"format": "float8_e4m3fn"}, {STEM: PLAIN}, "error"),
        (Fp8(), {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, {STEM: {"format": "float8_e4m3fn"}},
         "error"),
        (Fp8(), {"format": "float8_e4m3fn", "params": {"full_precision_matrix_mult": True}}, None, "warning"),
        (Int8(), {**PLAIN, "group_size": 1, "params": {"group_size": 2}}, None, "warning"),
        (Fp8(), {"format": "float8_e4m3fn"}, {STEM: {"format": "float8_e4m3fn"}, "lost": PLAIN}, "warning"),
    ],
    ids=["rotation", "format", "full precision", "params", "key twice", "absent layer"],
)  # fmt: skip
def test_marks_that_disagree_are_found_and_the_weight_is_read_in_the_readers_order(
    tmp_path: Path, fmt: Int8 | Fp8, beside: Any, header: Any, severity: str
) -> None:
    path = file(tmp_path, fmt, beside, header)
    read(path)
    assert [(each.severity, each.check) for each in findings(path)] == [(severity, "bad-mark")]


def test_an_unreadable_mark_that_the_header_replaces_is_found_and_harmless(tmp_path: Path) -> None:
    path = file(tmp_path, Fp8(), None, {STEM: {"format": "float8_e4m3fn"}})
    tensors = {f"{STEM}.{leaf}": each for leaf, each in Fp8().quantize(weight()).items()}
    tensors[f"{STEM}.comfy_quant"] = mark(PLAIN)[:-1].clone()
    metadata = {"_quantization_metadata": json.dumps({"layers": {STEM: {"format": "float8_e4m3fn"}}})}
    save_file(tensors, path, metadata)
    assert read(path).equal(Fp8().dequantize(Fp8().quantize(weight())))
    assert [(each.severity, each.check) for each in findings(path)] == [("error", "bad-mark")]


@pytest.mark.parametrize("elements", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
def test_the_marker_of_a_whole_file_and_marks_of_single_layers_are_read_together(
    tmp_path: Path, elements: int, dtype: torch.dtype
) -> None:
    fp8, int8 = Fp8().quantize(weight()), Int8().quantize(weight())
    tensors = {f"{STEM}.{leaf}": each for leaf, each in int8.items()} | {f"{STEM}.comfy_quant": mark(PLAIN)}
    old = {"blocks.1.proj.weight": fp8["weight"], "blocks.1.proj.scale_weight": fp8["weight_scale"]}
    save_file(tensors | old | {"scaled_fp8": torch.zeros(elements, dtype=dtype)}, tmp_path / "x.safetensors")
    with open_quantized(tmp_path / "x.safetensors") as opened:
        assert opened.layers[STEM].dequantize(0, 96).equal(Int8().dequantize(int8))
        assert opened.layers["blocks.1.proj"].dequantize(0, 96).equal(Fp8().dequantize(fp8))
    assert findings(tmp_path / "x.safetensors") == []


@pytest.mark.parametrize("told_by", ["bias", "orig_shape"])
@pytest.mark.parametrize(
    ("fmt", "padded"), [(Nvfp4(search=False), 32), (Mxfp8(search=False), 32)], ids=["nvfp4", "mxfp8"]
)
def test_rows_that_comfyui_adds_are_cut_off(tmp_path: Path, fmt: Nvfp4 | Mxfp8, padded: int, told_by: str) -> None:
    values = torch.zeros(padded, 256)
    values[:20] = weight()[:20]
    canonical, spelling = fmt.quantize(values), COMFYUI.spelling(fmt, (padded, 256))
    assert isinstance(spelling, WrittenSpelling)
    tensors = spelling.encode(canonical)
    if told_by == "bias":
        tensors["bias"] = torch.zeros(20)
    else:
        tensors["comfy_quant"] = mark({**json.loads(bytes(tensors["comfy_quant"].tolist())), "orig_shape": [20, 256]})
    save_file({f"{STEM}.{leaf}": each for leaf, each in tensors.items()}, tmp_path / "x.safetensors")
    with open_quantized(tmp_path / "x.safetensors") as opened:
        assert opened.layers[STEM].shape == (20, 256)
        assert opened.layers[STEM].dequantize(0, 20).equal(fmt.dequantize(canonical)[:20])
        assert opened.layers[STEM].dequantize(7, 19).equal(fmt.dequantize(canonical)[7:19])
    assert findings(tmp_path / "x.safetensors") == []


@pytest.mark.parametrize("shape", [[20, 250], [15, 256], [33, 256], [0, 256]], ids=str)
def test_another_shape_than_padding_explains_is_refused(tmp_path: Path, shape: list[int]) -> None:
    fmt = Nvfp4(search=False)
    spelling = COMFYUI.spelling(fmt, (32, 256))
    assert isinstance(spelling, WrittenSpelling)
    tensors = spelling.encode(fmt.quantize(weight()[:32]))
    tensors["comfy_quant"] = mark({"format": "nvfp4", "orig_shape": shape})
    save_file({f"{STEM}.{leaf}": each for leaf, each in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"found a weight of 32 x 256 for a layer of"):
        open_quantized(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("kind", "name", "is_known"),
    [
        ("QwenImageTransformer2DModel", "transformer_blocks.0.attn.to_q.weight", True),
        ("FluxTransformer2DModel", "double_blocks.0.img_attn.qkv.weight", True),
        ("FluxTransformer2DModel", "transformer_blocks.0.attn.to_q.weight", False),
        ("Flux2Transformer2DModel", "single_transformer_blocks.0.attn.to_out.weight", False),
        ("WanTransformer3DModel", "condition_embedder.time_proj.weight", False),
        ("WanTransformer3DModel", "time_projection.1.weight", True),
        ("ZImageTransformer2DModel", "all_x_embedder.2-1.weight", False),
        ("LTXVideoTransformer3DModel", "proj_in.weight", False),
    ],
)
def test_the_verdict_of_comfyui_looks_at_names(kind: str, name: str, is_known: bool) -> None:
    family = find_family(kind)
    assert (COMFYUI.names_flaw(family, [name, "x"]) is None) is is_known
