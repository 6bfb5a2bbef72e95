"""A table of layers says which format each has: checkpoints are held against it, and models quantized by it."""

import json

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import Source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects.verdict import OURS, VLLM_OMNI
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Channel
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders import build_quant_config, kernel_report, load_pipeline
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig

ROWS = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
MX = {"quant_algo": "MXFP8"}
FOUR_BITS = {"quant_algo": "W4A16_NVFP4", "group_size": 16}


def mixed(table):
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": table}


def formats_of(model):
    return {layer.name.removeprefix("transformer."): layer.format for layer in kernel_report(model)}


def test_layers_are_quantized_while_loading_as_the_table_says(tiny_pipeline_folder, tmp_path):
    table = {"layers.0.attention.to_out.0": MX, "feed_forward": ROWS, "layers.*.attention.*": FOUR_BITS}
    pipeline = load_pipeline(tiny_pipeline_folder, quantization=mixed(table))
    found = formats_of(pipeline)
    assert found["layers.0.attention.to_out.0"] == "mxfp8"
    assert found["layers.1.attention.to_out.0"] == found["layers.0.attention.to_q"] == "nvfp4"
    assert found["layers.1.feed_forward.w2"] == found["noise_refiner.0.feed_forward.w1"] == "fp8 per row"
    assert not any(name.startswith("noise_refiner.0.attention") for name in found)
    pipeline.transformer.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    listed = block["quantized_layers"]
    assert listed["layers.0.attention.to_qkv"] == listed["layers.0.attention.to_q"] == FOUR_BITS  # the runtime's name
    assert listed["layers.0.feed_forward.w1"] == ROWS
    again = ZImageTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert formats_of(again) == found
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor.flatten().view(torch.uint8), again.state_dict()[name].flatten().view(torch.uint8))


def test_what_is_saved_is_what_modelopt_writes_of_such_layers(tiny_pipeline_folder, tmp_path):
    load_pipeline(
        tiny_pipeline_folder, quantization=mixed({"feed_forward": ROWS, "attention": FOUR_BITS})
    ).transformer.save_pretrained(tmp_path)
    with open_quantized(tmp_path) as read:
        assert read.dialect == "modelopt"
        assert read.layers["layers.0.feed_forward.w1"].format.label == "fp8 per row"
        assert isinstance(read.layers["layers.0.attention.to_q"].format, Nvfp4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"feed_forward": {"quant_algo": "FP8"}}, r"static activations need calibration, found them of fp8"),
        ({"feed_forward": {"quant_algo": "NVFP4"}}, r"found them of nvfp4"),
        ({"feed_forwards": ROWS}, r"quantized_layers: 'feed_forwards' matches no layer of the model; did you mean"),
        ({"to_q": ROWS, "to_k": MX, "to_v": ROWS}, r"to_q, \S+to_k, \S+to_v are fused by runtimes, found several"),
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_is_refused(pipeline_folder, table, message):
    with pytest.raises(RecipeError, match=message):
        load_pipeline(pipeline_folder, quantization=mixed(table))


def test_a_config_of_other_methods_than_modelopts_is_refused():
    config = QuantizationConfig("mixed", layers=(("a", QuantizationConfig("int8")),))
    with pytest.raises(RecipeError, match="found int8, expected one of FP8, FP8_PER_CHANNEL_PER_TOKEN"):
        DiffusersConfig.of(config)
    assert build_quant_config(config) is config


W1, W2, W3 = (f"layers.0.feed_forward.{name}" for name in ("w1", "w2", "w3"))


@pytest.fixture
def write(tiny_pipeline_folder, tmp_path):
    """Three layers in formats of their own, among them a calibrated one, and what the config says of them."""

    def write(table):
        source = tiny_pipeline_folder / "transformer"
        (file,) = source.glob("*.safetensors")
        tensors = load_file(file)
        for stem, fmt in {W1: Fp8Channel(), W2: Mxfp8(), W3: Fp8()}.items():
            quantized = fmt.quantize(tensors.pop(f"{stem}.weight"))
            tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in quantized.items()}
        tensors[f"{W3}.input_scale"] = torch.tensor(0.01)
        save_file(tensors, tmp_path / file.name, metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text()) | {"quantization_config": mixed(table)}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_a_checkpoint_of_several_formats_is_loaded(write):
    model = ZImageTransformer2DModel.from_pretrained(
        write({W1: ROWS, W2: MX, W3: {"quant_algo": "FP8"}, "layers.0.feed_forward.w13": ROWS}), dtype=torch.bfloat16
    )
    assert formats_of(model) == {W1: "fp8 per row", W2: "mxfp8", W3: "fp8 static"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({W1: ROWS, W2: MX}, rf"{W3} holds fp8 static, found no such layer in quantized_layers"),
        ({W1: ROWS, W2: FOUR_BITS, W3: {"quant_algo": "FP8"}}, rf"{W2} holds mxfp8, expected nvfp4"),
        (
            {W1: {"quant_algo": "FP8"}, W2: MX, W3: {"quant_algo": "FP8"}},
            rf"{W1} holds fp8 per row, expected fp8 static",
        ),
        ({W1: ROWS, W2: MX, W3: ROWS}, rf"{W3} holds fp8 static, expected fp8 per row as its config says"),
    ],
    ids=["unlisted", "other format", "a scale too many", "a scale too few"],
)
def test_a_table_that_contradicts_the_tensors_is_refused(write, table, message):
    with pytest.raises(CheckpointError, match=message):
        ZImageTransformer2DModel.from_pretrained(write(table), dtype=torch.bfloat16)


def test_an_encoder_is_quantized_saved_loaded_and_found_sound(tiny_pipeline_folder, tmp_path):
    spec = {"text_encoder": mixed({"mlp": ROWS, "self_attn": MX})}
    encoder = load_pipeline(tiny_pipeline_folder, quantization=spec).text_encoder
    encoder.save_pretrained(tmp_path)
    again = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert formats_of(again) == formats_of(encoder)
    assert set(formats_of(again).values()) == {"fp8 per row", "mxfp8"}
    with open_quantized(tmp_path) as read:
        for stem, layer in read.layers.items():
            assert layer.format.label == formats_of(again)[stem]
            assert torch.equal(layer.dequantize(0, layer.shape[0]), again.get_submodule(stem).dequantize())
    (component,) = verify_source(Source(tmp_path, "encoder"))
    assert not [finding for finding in component.findings if finding.severity == "error"]


def test_mxfp8_in_modelopts_spelling_lists_the_layers_that_the_runtime_merges(tiny_pipeline_folder, tmp_path):
    for dialect in ("modelopt", "vllm-omni"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / dialect, Recipe(method="mxfp8", dialect=dialect))
    block = json.loads((tmp_path / "modelopt" / "transformer" / "config.json").read_text())["quantization_config"]
    assert block["quant_algo"] == "MIXED_PRECISION"
    listed = block["quantized_layers"]
    parts = {f"layers.0.attention.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_qkv")}
    assert {listed[name]["quant_algo"] for name in parts | {"layers.0.feed_forward.w13"}} == {"MXFP8"}
    theirs, ours = (load_pipeline(tmp_path / dialect).transformer for dialect in ("modelopt", "vllm-omni"))
    assert formats_of(theirs) == formats_of(ours)
    for name in formats_of(ours):
        assert theirs.get_submodule(name).dequantize().equal(ours.get_submodule(name).dequantize())
    inspected = next(each for each in inspect_source(Source(tmp_path / "modelopt", "model")) if each.layers)
    verdicts = {verdict.runtime: verdict for verdict in inspected.runtimes}
    assert verdicts[OURS].outcome == "loads"
    assert (verdicts[VLLM_OMNI].outcome, verdicts[VLLM_OMNI].why) == ("loads", "on CUDA")


def test_what_a_conversion_writes_in_modelopts_spelling_is_loaded(tiny_pipeline_folder, tmp_path):
    """Dynamic FP8 is FP8_PER_CHANNEL_PER_TOKEN there, and every row has a scale of its own."""
    for dialect in ("modelopt", "vllm-omni"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / dialect, Recipe(method="fp8", dialect=dialect))
    rows, whole = (load_pipeline(tmp_path / dialect).transformer for dialect in ("modelopt", "vllm-omni"))
    assert set(formats_of(rows).values()) == {"fp8 per row"}
    assert formats_of(rows).keys() == formats_of(whole).keys()
    plain = load_pipeline(tiny_pipeline_folder).transformer
    for name in formats_of(rows):
        weight = plain.get_submodule(name).weight
        expected = Fp8Channel().quantize(weight)
        layer = rows.get_submodule(name)
        assert layer.weight_scale.equal(expected["weight_scale"])
        assert layer.weight_scale.unique().numel() > 1
        off, coarse = ((model.get_submodule(name).dequantize() - weight).norm() for model in (rows, whole))
        assert off < coarse
