"""NF4: bitsandbytes' golden bytes, the search, and files that our loader runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.dialects.bitsandbytes import BITSANDBYTES
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.loaders import load_pipeline, quantize_linear

WEIGHTS = "diffusion_pytorch_model.safetensors"
# W = BF16(sin(0.37 i) (1 + i % 7)), [2, 64], as bitsandbytes 0.50.2 stores it.
GOLDEN = (
    "78adeee88642106557adf9abb952643224789bdeed7652100667acef9aa85215"
    "43347c8acddc97532111679ceff898631054457be9bccb95643212478bdeee87"
)


def golden_weight() -> Tensor:
    index = torch.arange(128, dtype=torch.float64)
    return (torch.sin(0.37 * index) * (1 + index % 7)).bfloat16().view(2, 64)


def error(fmt: Nf4, weight: Tensor) -> float:
    fmt = fmt.for_weight(tuple(weight.shape))
    return float((fmt.dequantize(fmt.quantize(weight)) - weight.float()).norm() / weight.float().norm())


def test_golden_bytes() -> None:
    tensors = Nf4(search=False).quantize(golden_weight())
    assert bytes(tensors["weight"].flatten().tolist()).hex() == GOLDEN
    assert tensors["weight_scale"].tolist() == [6.96875, 6.8125]
    assert error(Nf4(search=False), golden_weight()) == pytest.approx(0.09277, rel=1e-3)


def test_golden_bytes_of_nested_scales() -> None:
    fmt = Nf4(nested=True, search=False).for_weight((2, 64))
    tensors = fmt.quantize(golden_weight())
    assert bytes(tensors["weight"].flatten().tolist()).hex() == GOLDEN
    assert tensors["absmax"].tolist() == [255, 0]
    assert tensors["absmax_scale"].tolist() == [0.078125]
    assert float(tensors["absmax_offset"]) == 6.890625


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("columns", [64, 192, 3072])
def test_the_search_lowers_the_error(nested: bool, columns: int) -> None:
    weight = torch.randn(256, columns, generator=torch.Generator().manual_seed(0))
    assert error(Nf4(nested=nested), weight) < 0.94 * error(Nf4(nested=nested, search=False), weight) < 0.94 * 0.0935


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_zeros_and_tiny_blocks_stay_what_they_are(nested: bool) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    fmt = Nf4(nested=nested).for_weight((4, 128))
    restored = fmt.dequantize(fmt.quantize(weight))
    assert not restored[1].any()
    assert fmt.flaw(fmt.quantize(weight)) is None


def test_bitsandbytes_alone_holds_it_and_is_chosen() -> None:
    for name in WRITTEN:
        assert isinstance(DIALECTS[name].spelling(Nf4(), (64, 192)), str) == (name != "bitsandbytes"), name
    assert Recipe(method="nf4").dialect == "bitsandbytes"
    assert isinstance(BITSANDBYTES.spelling(Nf4(), (64, 96)), str)
    with pytest.raises(RecipeError, match="--double-quant: found with method 'fp8'"):
        Recipe(method="fp8", double_quant=True)


def test_names_that_would_leave_a_quantized_layer_out_are_refused() -> None:
    layers = {"single_transformer_blocks.0.proj_out": Nf4()}
    assert BITSANDBYTES.block(layers, ["x_embedder"])["llm_int8_skip_modules"] == ["x_embedder"]
    with pytest.raises(RecipeError, match=r"'single_transformer_blocks.0.proj_out': found it quantized and 'proj_out'"):
        BITSANDBYTES.block(layers, ["proj_out"])


def test_a_layer_runs_on_plain_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 64, dtype=torch.bfloat16)
    nn.init.normal_(linear.weight, generator=generator)
    layer = quantize_linear(linear, "nf4")
    x = torch.randn(8, 256, generator=generator).bfloat16()
    expected = x.float() @ layer.dequantize().T + linear.bias.detach().float()
    assert float((layer(x).float() - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_file_is_sound_kept_restored_and_run(tiny_pipeline_folder: Path, tmp_path: Path, nested: bool) -> None:
    out = tmp_path / "out"
    convert_checkpoint(tiny_pipeline_folder, out, Recipe(method="nf4", double_quant=nested, max_shard_size="200KB"))
    shards = sorted((out / "transformer").glob("*.safetensors"))
    stored = [load_file(shard) for shard in shards]
    assert len(shards) > 1
    for tensors in stored:  # bitsandbytes looks for all tensors of a layer in one file
        weights = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dtype is torch.uint8}
        assert weights == {name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")}
        assert all(f"{name}.quant_state.bitsandbytes__nf4" in tensors for name in weights)
        assert all(tensors[name].shape[1] == 1 for name in weights)
    block = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert block["bnb_4bit_use_double_quant"] is nested
    (verified,) = (
        each for each in verify_source(resolve_source(out), resolve_source(tiny_pipeline_folder)) if each.layers
    )
    assert verified.findings == ()

    convert_checkpoint(out, tmp_path / "kept", Recipe(method="keep", dialect="bitsandbytes", max_shard_size="200KB"))
    before = {name: tensor for tensors in stored for name, tensor in tensors.items()}
    kept = [load_file(shard) for shard in (tmp_path / "kept" / "transformer").glob("*.safetensors")]
    assert sum(map(len, kept)) == len(before)
    assert all(tensor.equal(before[name]) for tensors in kept for name, tensor in tensors.items())
    pipeline = load_pipeline(out)
    pipeline.transformer.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / WEIGHTS)
    assert saved.keys() == before.keys()
    assert all(tensor.equal(before[name]) for name, tensor in saved.items())
    convert_checkpoint(out, tmp_path / "restored", Recipe(method="dequantize"))
    restored = load_file(tmp_path / "restored" / "transformer" / WEIGHTS)
    layer = pipeline.transformer.layers[0].attention.to_q
    torch.testing.assert_close(
        layer.dequantize(), restored["layers.0.attention.to_q.weight"].float(), rtol=2**-8, atol=0
    )
