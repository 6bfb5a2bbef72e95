"""W4A16 stays packed as in the file, means what AutoRound's packing means, and is loaded by whom it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, ZImageTransformer2DModel
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers.quantizers.quantization_config import AutoRoundConfig as DiffusersAutoRoundConfig
from safetensors.torch import load_file
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.dialects import auto_round
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.rows import TILE_ELEMENTS
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.loaders import QuantizedLinear, kernel_report, load_pipeline, quantize_linear
from omni_convert.loaders.loading.quantizer import ConfigBlock
from omni_convert.loaders.memory.packed_int4 import PackedInt4

BLOCK = auto_round.to_block(32, ("layers.0.a",), ("proj_out",))
OTHERS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "MX": {"data_type": "mx_fp"},
    "AWQ's packing": {"packing_format": "auto_round:auto_awq"},
    "zero points as they are": {"packing_format": "auto_round"},
    "one group a row": {"group_size": -1},
    "a layer of 8 bits": {"extra_config": {"layers.0.a": {"bits": 8}}},
    "another method": {"quant_method": "gptq"},
    "damaged": {"extra_config": [1]},
}


@pytest.fixture(scope="module")
def converted(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("w4a16") / "out"
    convert_checkpoint(tiny_pipeline_folder, out, Recipe(method="w4a16", group_size=32, runtime="diffusers"))
    return out


def test_packing_a_weight_in_tiles_gives_the_codes_of_the_format() -> None:
    weight = torch.randn(TILE_ELEMENTS // 256 + 24, 256, generator=torch.Generator().manual_seed(0))
    packed, plain = PackedInt4(64).quantize(weight), Int4(64).quantize(weight)
    assert packed["qweight"].shape == (32, len(weight))
    assert packed["qzeros"].shape == (4, len(weight) // 8)
    assert (packed["scales"].dtype, packed["scales"].shape) == (torch.float16, (4, len(weight)))
    assert torch.equal(PackedInt4(64).dequantize(packed), Int4(64).dequantize(plain))


@pytest.mark.parametrize("kernel", ["cpu_decode_mm", "decode_weight_mm", "reference"])
def test_zero_points_that_differ_are_taken_off(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_CONVERT_KERNEL", kernel)
    tensors = PackedInt4(32).quantize(torch.randn(48, 96, generator=torch.Generator().manual_seed(0)))
    codes = (torch.arange(3 * 48) % 16).view(3, 48).to(torch.int32)  # the stored ones: one less than they mean
    tensors["qzeros"] = sum(codes[:, place::8] << 4 * place for place in range(8))
    activations = "bf16" if kernel == "decode_weight_mm" else "quantized"
    layer = QuantizedLinear(PackedInt4(32), tensors, activations=activations)
    stored = tensors["qweight"].T[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
    zeros = (codes.T + 1).repeat_interleave(32, dim=1)
    expected = (stored.flatten(1) - zeros) * tensors["scales"].T.float().repeat_interleave(32, dim=1)
    assert torch.equal(layer.dequantize(), expected)
    with torch.no_grad():
        assert torch.equal(layer(torch.eye(96).bfloat16()).T, expected.bfloat16())


def test_a_layer_keeps_as_many_bytes_as_the_file() -> None:
    layer = quantize_linear(nn.Linear(1024, 256, bias=False), "w4a16", search=False)
    layouts = Int4().layout(256, 1024)
    spelled = auto_round.AUTO_ROUND.spelling(Int4(), (256, 1024))
    assert not isinstance(spelled, str)
    expected = {name: (layout.dtype, layout.shape) for name, layout in spelled.layout(layouts).items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()} == expected


def test_load_pipeline_and_plain_diffusers_run_a_conversion_with_the_weights_of_the_file(converted: Path) -> None:
    pipe = load_pipeline(converted, strict=True)  # nothing else than bf16 activations can be asked of it
    report = kernel_report(pipe)
    assert report.kernels == ("cpu_decode_mm",)
    assert not report.fallbacks
    plain = DiffusionPipeline.from_pretrained(converted, dtype=torch.bfloat16)
    stored: dict[str, torch.Tensor] = {}
    for file in (converted / "transformer").glob("*.safetensors"):
        stored |= load_file(file)
    with open_quantized(converted / "transformer") as opened:
        assert len(opened.layers) == len(report)
        for stem, layer in opened.layers.items():
            for model in (pipe.transformer, plain.transformer):
                loaded = model.get_submodule(stem)
                assert torch.equal(loaded.dequantize(), layer.dequantize(0, layer.shape[0]))
                assert all(
                    torch.equal(getattr(loaded, suffix), stored[f"{stem}.{suffix}"]) for suffix in loaded.tensor_names
                )


def test_a_block_that_contradicts_the_file_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    for file in (converted / "transformer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes().replace(b'"group_size": 32', b'"group_size": 16'))
    with pytest.raises(CheckpointError, match=r"scales is F16 \[6, 192\], expected F16 \[12, 192\] for w4a16"):
        ZImageTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)


def test_a_model_quantized_while_loading_is_saved_as_auto_round_spells_it(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    spec = {
        "transformer": {"method": "w4a16", "group_size": 32, "ignored_layers": ["feed_forward"]},
        "text_encoder": {"method": "w4a16", "group_size": 32},
    }
    pipe = load_pipeline(tiny_pipeline_folder, quantization=spec)
    pipe.save_pretrained(tmp_path)
    for component in ("transformer", "text_encoder"):
        with open_quantized(tmp_path / component) as opened:
            assert (opened.dialect, opened.block["group_size"]) == ("auto-round", 32)
            assert opened.layers
            assert not set(opened.layers) & set(opened.block["extra_config"])
    again = load_pipeline(tmp_path)
    assert kernel_report(again) == kernel_report(pipe)
    for component in ("transformer", "text_encoder"):
        before, after = (getattr(each, component).state_dict() for each in (pipe, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_blocks_of_what_we_do_not_run_are_left_to_auto_round(change: dict[str, Any]) -> None:
    assert auto_round.from_block(BLOCK) is not None
    assert auto_round.from_block(BLOCK | change) is None


@pytest.mark.parametrize(
    ("quantizer", "config"),
    [
        (DiffusersAutoQuantizer, DiffusersAutoRoundConfig),
        (AutoHfQuantizer, transformers.AutoRoundConfig),
    ],
    ids=["diffusers", "transformers"],
)
def test_our_quantizer_has_the_blocks_that_it_reads_unless_the_other_is_named(quantizer: Any, config: Any) -> None:
    assert isinstance(quantizer.merge_quantization_configs(dict(BLOCK), None), ConfigBlock)
    awq = {**BLOCK, "packing_format": "auto_round:auto_awq"}
    assert isinstance(quantizer.merge_quantization_configs(awq, None), config)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert isinstance(quantizer.merge_quantization_configs(dict(BLOCK), config(group_size=32)), config)
