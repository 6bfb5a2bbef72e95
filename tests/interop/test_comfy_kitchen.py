"""ComfyUI's spelling against ComfyUI's own kernels: what they pack we read, what we write they unpack, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import Source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.schemes.convrot_w4a4 import ConvrotW4A4
from omni_convert.formats.schemes.int8 import RotatedInt8
from omni_convert.formats.views.opened import QuantizedCheckpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Layers that ComfyUI has in one have a scale for each row, where vLLM-Omni's parts would share them.
FUSED = {"int8": "per-row"}
SHAPES = [(64, 96), (128, 64), (320, 576)]


@pytest.fixture
def kitchen(import_peer):  # type: ignore[no-untyped-def]  # their module
    return import_peer("comfy_kitchen")


def parts_of(stem: str) -> list[str]:
    """The layers of diffusers that are one of ComfyUI's in Z-Image."""
    if stem.endswith(".attention.qkv"):
        return [stem.replace("qkv", f"to_{part}") for part in "qkv"]
    return [stem.replace(".attention.out", ".attention.to_out.0")]


def source_weight(source: QuantizedCheckpoint, stem: str) -> Tensor:
    return torch.cat([source.checkpoint.read(f"{part}.weight") for part in parts_of(stem)]).float()


def random_weight(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


def read_back(tmp_path: Path, tensors: dict[str, Tensor], mark: dict[str, object] | None) -> tuple[str, Tensor]:
    """The dialect and the float32 weight that our reader finds in a file of one layer."""
    layer = {f"blocks.0.proj.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    if mark is not None:
        layer["blocks.0.proj.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    else:
        layer["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(layer, tmp_path / "model.safetensors")
    with open_quantized(tmp_path / "model.safetensors") as opened:
        (found,) = opened.layers.values()
        return str(opened.dialect), torch.cat([found.dequantize(row, row + 1) for row in range(found.shape[0])])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_their_nvfp4_is_read(kitchen, tmp_path: Path, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    weight = random_weight(shape)
    scale = weight.abs().amax() / (448 * 6)
    codes, blocks = kitchen.quantize_nvfp4(weight, scale)
    dialect, ours = read_back(
        tmp_path, {"weight": codes, "weight_scale": blocks, "weight_scale_2": scale}, {"format": "nvfp4"}
    )
    assert dialect == "comfyui"
    assert ours.to(torch.bfloat16).equal(
        kitchen.dequantize_nvfp4(codes, scale, blocks, torch.float32).to(torch.bfloat16)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_their_mxfp8_is_read(kitchen, tmp_path: Path, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    codes, blocks = kitchen.quantize_mxfp8(random_weight(shape))
    _, ours = read_back(tmp_path, {"weight": codes, "weight_scale": blocks.view(torch.uint8)}, {"format": "mxfp8"})
    assert ours.equal(kitchen.dequantize_mxfp8(codes, blocks, torch.float32))


@pytest.mark.parametrize("legacy", [False, True], ids=["marked", "legacy"])
def test_their_fp8_is_read(kitchen, tmp_path: Path, legacy: bool) -> None:  # type: ignore[no-untyped-def]
    weight = random_weight((64, 96))
    scale = weight.abs().amax() / 448
    codes = kitchen.quantize_per_tensor_fp8(weight, scale)
    name = "scale_weight" if legacy else "weight_scale"
    mark = None if legacy else {"format": "float8_e4m3fn"}
    dialect, ours = read_back(tmp_path, {"weight": codes, name: scale}, mark)
    assert dialect == "comfyui"
    assert ours.equal(kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32))


@pytest.mark.parametrize("convrot", [False, True], ids=["plain", "convrot"])
def test_their_int8_is_read(kitchen, import_peer, tmp_path: Path, convrot: bool) -> None:  # type: ignore[no-untyped-def]
    layout = import_peer("comfy_kitchen.tensor.int8").TensorWiseINT8Layout
    codes, params = layout.quantize(random_weight((64, 256)), per_channel=True, convrot=convrot, convrot_groupsize=64)
    mark: dict[str, object] = {"format": "int8_tensorwise"}
    if convrot:
        mark |= {"convrot": True, "convrot_groupsize": 64}
    _, ours = read_back(tmp_path, {"weight": codes, "weight_scale": params.scale}, mark)
    theirs = layout.dequantize(codes, params)
    if convrot:  # sums of 64 products in another order
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * 2**-20)
    else:
        assert ours.equal(theirs)


@pytest.mark.parametrize("method", ["fp8", "int8", "mxfp8", "nvfp4"])
def test_our_files_are_unpacked_by_their_kernels(  # type: ignore[no-untyped-def]
    kitchen, tiny_pipeline_folder: Path, tmp_path: Path, method: str
) -> None:
    fused = FUSED.get(method, "shared")
    for name, dialect in (("plain", "vllm-omni"), ("comfy", "comfyui")):
        recipe = Recipe(method=method, dialect=dialect, int8_fused_scales=fused)
        convert_checkpoint(tiny_pipeline_folder, tmp_path / name, recipe)
    tensors = load_file(tmp_path / "comfy" / "transformer" / WEIGHTS)
    unpack = {
        "fp8": lambda weight, scale, _: kitchen.dequantize_per_tensor_fp8(weight, scale, torch.float32),
        "int8": lambda weight, scale, _: kitchen.dequantize_int8_simple(weight, scale).float(),
        "mxfp8": lambda weight, scale, _: kitchen.dequantize_mxfp8(
            weight, scale.view(torch.float8_e8m0fnu), torch.float32
        ),
        "nvfp4": lambda weight, scale, scale_2: kitchen.dequantize_nvfp4(weight, scale_2, scale, torch.float32),
    }[method]
    with open_quantized(tmp_path / "plain" / "transformer") as plain:
        stems = [name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")]
        assert {part for stem in stems for part in parts_of(stem)} == plain.layers.keys()
        for stem in stems:
            parts = (tensors.get(f"{stem}.{suffix}") for suffix in ("weight", "weight_scale", "weight_scale_2"))
            theirs = unpack(*parts).to(torch.bfloat16)
            layers = [plain.layers[part] for part in parts_of(stem)]
            ours = torch.cat([layer.dequantize(0, layer.shape[0]) for layer in layers])
            assert theirs.equal(ours.to(torch.bfloat16)), stem


@pytest.mark.parametrize("group", [16, 64, 256])
def test_our_rotated_int8_has_their_bytes(import_peer, group: int) -> None:  # type: ignore[no-untyped-def]
    layout = import_peer("comfy_kitchen.tensor.int8").TensorWiseINT8Layout
    weight = random_weight((320, 768)).to(torch.bfloat16)
    codes, params = layout.quantize(weight.float(), per_channel=True, convrot=True, convrot_groupsize=group)
    ours = RotatedInt8(group).quantize(weight)
    assert ours["weight"].equal(codes)
    assert ours["weight_scale"].flatten().equal(params.scale.flatten())


def test_our_rotated_file_is_unpacked_by_their_kernels_and_found_sound(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    layout = import_peer("comfy_kitchen.tensor.int8").TensorWiseINT8Layout
    recipe = Recipe(method="int8", dialect="comfyui", rotate=True)
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    convert_checkpoint(tmp_path / "out", tmp_path / "kept", Recipe(method="keep", dialect="comfyui"))
    folder = tmp_path / "out" / "transformer"
    tensors = load_file(folder / WEIGHTS)
    assert (tmp_path / "kept" / "transformer" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    with open_quantized(tiny_pipeline_folder / "transformer") as source, open_quantized(folder) as ours:
        assert ours.layers
        for stem, layer in ours.layers.items():
            original = source_weight(source, stem)
            assert layer.format.encoding is not None
            group = layer.format.encoding.rotation
            _, params = layout.quantize(original, per_channel=True, convrot=True, convrot_groupsize=group)
            theirs = layout.dequantize(tensors[f"{stem}.weight"], params)
            torch.testing.assert_close(layer.dequantize(0, layer.shape[0]), theirs, rtol=0, atol=2**-18)
    verified = verify_source(Source(tmp_path / "out", "out"), Source(tiny_pipeline_folder, "source"))
    assert any(component.layers for component in verified)
    assert all(component.findings == () for component in verified)


@pytest.mark.parametrize("group", [16, 64, 256])
def test_our_w4a4_without_a_search_has_their_bytes(import_peer, group: int) -> None:  # type: ignore[no-untyped-def]
    theirs = import_peer("comfy_kitchen.backends.eager.convrot_w4a4")
    weight = random_weight((320, 768)).to(torch.bfloat16)
    codes, scales = theirs.quantize_convrot_w4a4_weight(weight.float(), group)
    ours = ConvrotW4A4(group, search=False).quantize(weight)
    assert ours["weight"].equal(codes.view(torch.uint8))
    assert ours["weight_scale"].flatten().equal(scales)


def test_our_w4a4_file_is_unpacked_by_their_kernels_and_found_sound(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    theirs = import_peer("comfy_kitchen.backends.eager.convrot_w4a4")
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="convrot_w4a4"))
    assert any("the only one that holds it" in note for note in report.notes)
    convert_checkpoint(tmp_path / "out", tmp_path / "kept", Recipe(method="keep", dialect="comfyui"))
    folder = tmp_path / "out" / "transformer"
    tensors = load_file(folder / WEIGHTS)
    assert (tmp_path / "kept" / "transformer" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    with open_quantized(folder) as ours:
        assert ours.layers
        for stem, layer in ours.layers.items():
            assert layer.format.encoding is not None
            codes, scales = tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale"]
            unpacked = theirs.dequantize_convrot_w4a4_weight(codes, scales, layer.format.encoding.rotation)
            torch.testing.assert_close(layer.dequantize(0, layer.shape[0]), unpacked, rtol=0, atol=2**-18)
    verified = verify_source(Source(tmp_path / "out", "out"), Source(tiny_pipeline_folder, "source"))
    assert any(component.layers for component in verified)
    assert all(component.findings == () for component in verified)


@pytest.mark.parametrize("method", ["w4a8", "w6a8"])
def test_our_levels_on_a_grid_are_their_bytes_and_are_read_back(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path, method: str
) -> None:
    theirs = import_peer("comfy_kitchen.backends.eager.w4a8_int8")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method=method, search=False))
    convert_checkpoint(tmp_path / "out", tmp_path / "kept", Recipe(method="keep", dialect="comfyui"))
    folder = tmp_path / "out" / "transformer"
    tensors = load_file(folder / WEIGHTS)
    assert (tmp_path / "kept" / "transformer" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    with open_quantized(folder) as ours, open_quantized(tiny_pipeline_folder / "transformer") as source:
        assert {layer.format.method for layer in ours.layers.values()} == {method}
        for stem, layer in ours.layers.items():
            assert layer.format.encoding is not None
            group, bits = layer.format.encoding.rotation, int(method[1])
            original = source_weight(source, stem)
            book = tensors.get(f"{stem}.weight_codebook")
            packed, steps, rows, *_ = theirs.quantize_w4a8_int8_weight(
                original, 16, group, bits=bits, codebook_tensor=book
            )
            assert tensors[f"{stem}.weight"].equal(packed), stem
            assert tensors[f"{stem}.weight_s_rel"].float().equal(steps.float()), stem
            assert tensors[f"{stem}.weight_s_channel"].equal(rows), stem
            unpacked = theirs.dequantize_w4a8_int8_weight(packed, steps, rows, book, None, 16, group, torch.float32)
            torch.testing.assert_close(layer.dequantize(0, layer.shape[0]), unpacked, rtol=0, atol=2**-18)
    verified = verify_source(Source(tmp_path / "out", "out"), Source(tiny_pipeline_folder, "source"))
    assert any(component.layers for component in verified)
    assert all(component.findings == () for component in verified)


def test_our_e5m2_file_is_unpacked_by_their_kernels_and_found_sound(  # type: ignore[no-untyped-def]
    kitchen, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method="fp8", dialect="comfyui", element="e5m2")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    folder = tmp_path / "out" / "transformer"
    tensors = load_file(folder / WEIGHTS)
    with open_quantized(tiny_pipeline_folder / "transformer") as source, open_quantized(folder) as ours:
        assert ours.layers
        for stem, layer in ours.layers.items():
            codes, scale = tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale"]
            assert codes.dtype is torch.float8_e5m2
            assert json.loads(bytes(tensors[f"{stem}.comfy_quant"].tolist())) == {"format": "float8_e5m2"}
            theirs = kitchen.dequantize_per_tensor_fp8(codes, scale, torch.float32)
            assert theirs.equal(layer.dequantize(0, layer.shape[0]))
            original = source_weight(source, stem)
            assert (theirs - original).norm() < 0.06 * original.norm()
    verified = verify_source(Source(tmp_path / "out", "out"), Source(tiny_pipeline_folder, "source"))
    assert any(component.layers for component in verified)
    assert all(component.findings == () for component in verified)
