"""Spellings of other projects: Black Forest Labs' files by diffusers, and AutoRound's W4A16."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.views.opened import QuantizedLayer
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.memory.packed_int4 import PackedInt4

STEM = "blocks.0.proj"
WEIGHTS = "model.safetensors"


def layer_of(tmp_path: Path, tensors: dict[str, Tensor], block: dict[str, object] | None = None) -> QuantizedLayer:
    save_file({f"{STEM}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, tmp_path / WEIGHTS)
    if block is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    return open_quantized(tmp_path).layers[STEM]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(192, 320, generator=torch.Generator().manual_seed(0)) * 0.05


def test_files_of_black_forest_labs_are_read_as_diffusers_reads_them(tmp_path: Path, weight: Tensor) -> None:
    from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4, quantize_fp8r, quantize_nvfp4

    codes, scale = quantize_fp8r(weight)
    layer = layer_of(tmp_path, {"weight": codes, "weight_scale": scale})
    assert layer.format.label == "fp8 per row"
    assert layer.dequantize(0, 192).equal(dequantize_fp8r(codes, scale))

    codes, scale, overall = quantize_nvfp4(weight)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": overall, "input_scale": torch.tensor(0.5)}
    assert layer_of(tmp_path, tensors).dequantize(0, 192).equal(dequantize_nvfp4(codes, scale, overall))


@pytest.mark.parametrize("group", [32, 64])
def test_w4a16_of_ours_is_multiplied_by_auto_round(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path, group: int
) -> None:
    packing = import_peer("auto_round_extension.torch.qlinear_torch_zp")
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="w4a16", group_size=group))
    assert max(layer.relative_error for layer in report.layers) < 0.12
    folder = tmp_path / "out" / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    with open_quantized(folder) as opened:
        assert opened.dialect == "auto-round"
        for stem, layer in opened.layers.items():
            rows, columns = layer.shape
            theirs = packing.QuantLinear(4, group, columns, rows, bias=False)
            own = {name: tensors[f"{stem}.{name}"] for name in ("qweight", "qzeros", "scales")}
            theirs.load_state_dict(own, strict=False)
            product = theirs(torch.eye(columns)).T
            torch.testing.assert_close(layer.dequantize(0, rows), product, rtol=2**-9, atol=0)
            loaded = QuantizedLinear(PackedInt4(group), own).dequantize()
            assert loaded.equal(layer.dequantize(0, rows))
            assert loaded.half().equal(product.half())  # they multiply in float16; this product loses nothing


def test_w4a16_of_ours_is_loaded_by_diffusers(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    import_peer("auto_round.inference.convert_model")
    from diffusers import AutoRoundConfig, ZImageTransformer2DModel

    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="w4a16", group_size=32))
    folder = tmp_path / "out" / "transformer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = ZImageTransformer2DModel.from_pretrained(
            folder,
            torch_dtype=torch.bfloat16,
            quantization_config=AutoRoundConfig(group_size=32),  # else ours would load it
        )
    with open_quantized(folder) as opened, torch.no_grad():
        for stem, layer in opened.layers.items():
            module = model.get_submodule(stem)
            assert type(module).__name__ == "QuantLinear"
            product = module(torch.eye(layer.shape[1], dtype=torch.bfloat16)) - (
                0 if module.bias is None else module.bias
            )
            torch.testing.assert_close(layer.dequantize(0, layer.shape[0]), product.T.float(), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])
def test_mx_of_ours_in_auto_rounds_spelling_is_loaded_by_diffusers(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path, method: str
) -> None:
    import_peer("auto_round.inference.convert_model")
    from diffusers import ZImageTransformer2DModel

    recipe = Recipe(method=method, dialect="auto-round", ignored_layers=("*.w1",))
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    folder = tmp_path / "out" / "transformer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with open_quantized(folder) as opened:
        for stem, layer in opened.layers.items():
            module = model.get_submodule(stem)
            assert type(module).__name__ == f"{method.upper()}QuantLinear"
            assert module.dequant_weight_online().float().equal(layer.dequantize(0, layer.shape[0]))


@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "zero points"])
def test_w4a16_is_read_as_auto_round_packs_it(import_peer, tmp_path: Path, is_symmetric: bool) -> None:  # type: ignore[no-untyped-def]
    packing = import_peer("auto_round_extension.torch.qlinear_torch_zp")
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 64, bias=False)
    scales = torch.rand(64, 2, generator=draw).half().float() * 0.01 + 0.001
    zeros = torch.full((64, 2), 8.0) if is_symmetric else torch.randint(1, 16, (64, 2), generator=draw).float()
    packed = packing.QuantLinear(4, 128, 256, 64, bias=False)
    packed.pack(linear, scales, zeros, device="cpu")
    tensors = {name: tensor for name, tensor in packed.state_dict().items() if name != "g_idx"}
    block: dict[str, object] = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}
    layer = layer_of(tmp_path, tensors, block)
    assert layer.format.label == "int4 group 128"
    theirs = packed(torch.eye(256)).T.float()  # a forward pass over the identity is the weight
    torch.testing.assert_close(layer.dequantize(0, 64), theirs, rtol=2**-9, atol=0)  # they multiply in float16
    assert layer.dequantize(3, 5).equal(layer.dequantize(0, 64)[3:5])


@pytest.mark.parametrize(
    "said",
    [{"data_type": "mx_int"}, {"data_type": "mx_fp", "rotation_config": {"hadamard_type": "hadamard"}}],
    ids=["mxint4", "rotated"],
)
def test_auto_rounds_files_that_look_like_mxfp4_are_refused(tmp_path: Path, said: dict[str, object]) -> None:
    tensors = {"weight_packed": torch.zeros(64, 64).byte(), "weight_scale": torch.full((64, 4), 127).byte()}
    block: dict[str, object] = {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}
    assert layer_of(tmp_path, tensors, block).format.label == "mxfp4"
    with pytest.raises(CheckpointError, match="in the config block, expected"):
        layer_of(tmp_path, tensors, block | said)
