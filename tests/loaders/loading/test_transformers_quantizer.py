"""Plain transformers loads our text encoders bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Qwen3ForCausalLM, Qwen3Model

from omni_convert.formats.dialects import auto_round
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.loaders import QuantizedLinear, kernel_report
from omni_convert.loaders.loading.transformers_quantizer import TransformersConfig
from omni_convert.loaders.memory.packed_int4 import PackedInt4

FP8 = {"quant_method": "omni_convert", "method": "fp8", "activation_scheme": "dynamic"} | {
    "is_checkpoint_fp8_serialized": True
}
INT8 = {"quant_method": "omni_convert", "method": "int8", "is_checkpoint_int8_serialized": True}
MX = {"quant_method": "omni_convert"}
CHECKPOINTS = {
    "fp8": (Fp8(), FP8),
    "fp8 static": (Fp8(static=True), FP8 | {"activation_scheme": "static"}),
    "fp8 block": (Fp8Block((16, 16)), FP8 | {"weight_block_size": [16, 16]}),
    "fp8 per channel": (Fp8Channel(), MX | {"method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "int8": (Int8(), INT8 | {"ignored_layers": ["lm_head"]}),
    "mxfp8": (Mxfp8(), MX | {"method": "mxfp8", "is_checkpoint_mxfp8_serialized": True}),
    "mxfp4": (Mxfp4(), MX | {"method": "mxfp4", "is_checkpoint_mxfp4_serialized": True}),
    "mxfp4_dualscale": (Mxfp4DualScale(), MX | {"method": "mxfp4_dualscale", "is_checkpoint_serialized": True}),
    "w4a16": (PackedInt4(32), auto_round.to_block(32, (), ())),
}
LAYERS = 14
IDS = torch.tensor([[2, 3, 4]])


@pytest.fixture(params=CHECKPOINTS)
def folder(request, quantize):
    return quantize(*CHECKPOINTS[request.param], component="text_encoder") / "text_encoder"


@pytest.fixture
def int8_folder(quantize):
    return quantize(*CHECKPOINTS["int8"], component="text_encoder") / "text_encoder"


def stored_tensors(folder):
    return load_file(folder / "model.safetensors")


def edit(folder, change):
    tensors = stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype is right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor.flatten().view(torch.uint8), right[name].flatten().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_quantized_tensor_arrives_bit_exact_whatever_the_dtype_of_the_model(folder, dtype):
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype)
    stored = stored_tensors(folder)
    stems = {name.rpartition(".")[0] for name in stored if "scale" in name}
    assert len(stems) in (LAYERS, 2)  # dual-scale takes the two layers with 64 inputs, the others have 32
    for stem in stems:
        layer = {
            name.removeprefix(f"{stem}."): tensor for name, tensor in stored.items() if name.startswith(f"{stem}.")
        }
        assert_same_bits(layer, model.get_submodule(stem).disk_tensors())
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == stems
    assert model.dtype is dtype


def test_saving_and_loading_again_changes_nothing(folder, tmp_path):
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == block
    assert_same_bits(stored_tensors(folder), stored_tensors(tmp_path / "again"))
    again = Qwen3ForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_it_computes_what_the_unquantized_encoder_does(int8_folder, pipeline_folder):
    plain = Qwen3ForCausalLM.from_pretrained(pipeline_folder / "text_encoder", dtype=torch.bfloat16)
    quantized = Qwen3ForCausalLM.from_pretrained(int8_folder, dtype=torch.bfloat16)
    expected = plain(IDS).logits.float()
    assert 0 < (quantized(IDS).logits.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("model_class", [Qwen3Model, AutoModel])
def test_the_base_model_finds_the_layers_under_its_shorter_names(int8_folder, model_class):
    base = model_class.from_pretrained(int8_folder, dtype=torch.bfloat16)
    head = Qwen3ForCausalLM.from_pretrained(int8_folder, dtype=torch.bfloat16)
    assert len(kernel_report(base)) == LAYERS
    assert torch.equal(base(IDS).last_hidden_state, head.model(IDS).last_hidden_state)


def test_the_dtype_auto_is_never_that_of_codes(folder):
    config = folder / "config.json"
    values = json.loads(config.read_text())
    values.pop("dtype", None)
    config.write_text(json.dumps(values))
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype is torch.bfloat16


LAYER = "model.layers.0.mlp.up_proj"
SCALE = f"{LAYER}.weight_scale"


def move_layer(tensors):
    for suffix in ("weight", "weight_scale"):
        tensors[f"model.layers.7.mlp.up_proj.{suffix}"] = tensors.pop(f"{LAYER}.{suffix}")


DAMAGES = {
    "scale missing": (lambda t: t.pop(SCALE), f"{LAYER}.weight is I8 without its scale"),
    "Inf scale": (lambda t: t[SCALE].fill_(torch.inf), f"{SCALE} holds NaN, Inf"),
    "no home": (lambda t: t.update({f"{LAYER}.mul_scale": torch.ones(2)}), "1 tensor that .* does not have"),
    "no such layer": (move_layer, r"layers\.7\.mlp\.up_proj is quantized, found nothing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(int8_folder, damage):
    damaging, message = DAMAGES[damage]
    edit(int8_folder, damaging)
    with pytest.raises(CheckpointError, match=message):
        Qwen3ForCausalLM.from_pretrained(int8_folder, dtype=torch.bfloat16)


def test_an_encoder_is_quantized_while_it_loads(pipeline_folder, tmp_path):
    folder = pipeline_folder / "text_encoder"
    config = TransformersConfig(INT8 | {"ignored_layers": ["o_proj"]})
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    for suffix, tensor in Int8().quantize(weight).items():
        assert torch.equal(model.model.layers[1].mlp.down_proj.get_buffer(suffix), tensor)
    assert len(kernel_report(model)) == LAYERS - 2
    assert isinstance(model.model.layers[0].self_attn.o_proj, torch.nn.Linear)
    model.save_pretrained(tmp_path)
    again = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_dequantize_gives_back_plain_linears(int8_folder):
    model = Qwen3ForCausalLM.from_pretrained(int8_folder, dtype=torch.bfloat16)
    expected = model.model.layers[0].mlp.up_proj.dequantize().bfloat16()
    model.dequantize()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
