"""Plain diffusers loads our checkpoints bit for bit, and refuses those that do not hold what they say."""

import json
import re
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ZImageTransformer2DModel
from diffusers.quantizers import auto
from diffusers.quantizers.modelopt import NVIDIAModelOptQuantizer
from diffusers.quantizers.quantization_config import NVIDIAModelOptConfig
from safetensors.torch import load_file, save_file

from omni_convert.formats.dialects import auto_round
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.loaders import QuantizedLinear, kernel_report, load_pipeline
from omni_convert.loaders.memory.packed_int4 import PackedInt4

FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "is_checkpoint_fp8_serialized": True,
    "ignored_layers": [],
}
INT8 = {"quant_method": "int8", "is_checkpoint_int8_serialized": True, "activation_scheme": "dynamic"}
MXFP8 = {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True, "ignored_layers": []}
MXFP4 = {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True, "require_smooth_scale": False}
DUALSCALE = {"quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*proj_out*"], "producer": {"name": "modelopt"}}


def modelopt_nvfp4(static):
    encoding = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": encoding if static else None, "weights": encoding, "targets": ["Linear"]}
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": group}, "ignore": []}


CHECKPOINTS = {
    "fp8": (Fp8(), FP8),
    "fp8 static": (Fp8(static=True), FP8 | {"activation_scheme": "static"}),
    "fp8 block": (Fp8Block((32, 32)), FP8 | {"weight_block_size": [32, 32]}),
    "int8": (Int8(), INT8),
    "modelopt fp8": (Fp8(static=True), MODELOPT),
    "modelopt fp8 per channel": (Fp8Channel(), MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "mxfp8": (Mxfp8(), MXFP8),
    "mxfp4": (Mxfp4(), MXFP4),
    "mxfp4 smooth": (Mxfp4(smooth=True), MXFP4 | {"require_smooth_scale": True}),
    "mxfp4 mul_scale": (Mxfp4(smooth=True), MXFP4),
    "mxfp4_dualscale": (Mxfp4DualScale(), DUALSCALE),
    "nvfp4": (Nvfp4(static=True), modelopt_nvfp4(static=True)),
    "nvfp4 weights": (Nvfp4(), modelopt_nvfp4(static=False)),
    "w4a16": (PackedInt4(16), auto_round.to_block(16, (), ())),
}


@pytest.fixture(params=CHECKPOINTS)
def folder(request, quantize):
    return quantize(*CHECKPOINTS[request.param])


@pytest.fixture
def int8_folder(quantize):
    return quantize(Int8(), INT8)


def load(folder, **kwargs):
    return ZImageTransformer2DModel.from_pretrained(folder, subfolder="transformer", **kwargs)


def weights_file(folder):
    (file,) = (folder / "transformer").glob("*.safetensors")
    return file


def edit(folder, change):
    """Rewrites the transformer's tensors."""
    tensors = load_file(weights_file(folder))
    change(tensors)
    save_file(tensors, weights_file(folder), metadata={"format": "pt"})


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype is right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor.flatten().view(torch.uint8), right[name].flatten().view(torch.uint8)), name


def disk_state(model):
    """Every tensor, those of quantized layers as on disk."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            state |= {f"{name}.{suffix}": tensor for suffix, tensor in layer.disk_tensors().items()}
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_quantized_tensor_arrives_bit_exact_whatever_the_dtype_of_the_model(folder, dtype):
    model = load(folder, dtype=dtype)
    stored = load_file(weights_file(folder))
    scales = {name for name in stored if "scale" in name}
    assert scales
    quantized = {n: t for n, t in stored.items() if n.rpartition(".")[0] in {s.rpartition(".")[0] for s in scales}}
    assert_same_bits(quantized, {n: t for n, t in disk_state(model).items() if n in quantized})
    assert model.dtype is dtype


def test_exactly_the_layers_that_the_file_holds_quantized_are_replaced(folder):
    model = load(folder, dtype=torch.bfloat16)
    replaced = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    stored = load_file(weights_file(folder))
    assert replaced == {
        name.rpartition(".")[0] for name in stored if name.rpartition(".")[2].startswith(("weight_scale", "scales"))
    }
    assert not [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]


def test_plain_diffusers_and_load_pipeline_give_the_same_pipeline(folder, make_image):
    plain = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    ours = load_pipeline(folder)
    assert_same_bits(plain.transformer.state_dict(), ours.transformer.state_dict())
    assert kernel_report(plain) == kernel_report(ours)
    image = make_image(plain)
    assert torch.isfinite(image).all()
    assert torch.equal(image, make_image(ours))


@pytest.mark.parametrize("name", ["fp8", "fp8 block", "modelopt fp8 per channel", "int8"])
def test_the_picture_is_close_to_that_of_the_unquantized_pipeline(name, quantize, pipeline_folder, make_image):
    image = make_image(load_pipeline(quantize(*CHECKPOINTS[name])))
    reference = make_image(load_pipeline(pipeline_folder))
    assert 0 < (image - reference).norm() < 0.1 * reference.norm()


def test_saving_and_loading_again_changes_nothing(folder, tmp_path):
    model = load(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    block = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == block
    assert_same_bits(load_file(weights_file(folder)), load_file(next((tmp_path / "again").glob("*.safetensors"))))
    again = ZImageTransformer2DModel.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert_same_bits(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("name", ["mxfp4 smooth", "mxfp4_dualscale"])
def test_containers_are_packed_in_memory(name, quantize):
    fmt, block = CHECKPOINTS[name]
    for layer in kernel_report(load(quantize(fmt, block), dtype=torch.bfloat16)):
        assert layer.bytes_per_weight < 0.7  # scales weigh much in layers as small as these


def test_values_that_are_not_of_e2m1_are_refused_not_rounded(quantize):
    folder = quantize(Mxfp4DualScale(), DUALSCALE)
    edit(folder, change("layers.0.feed_forward.w2.weight", lambda tensor: tensor.fill_(5.0)))
    with pytest.raises(CheckpointError, match=r"transformer: layers\.0\.\S+: found values that are not of E2M1"):
        load(folder)


def test_codes_that_are_nan_are_refused(quantize):
    folder = quantize(Mxfp8(), MXFP8)
    edit(folder, change(f"{LAYER}.weight", lambda tensor: tensor.fill_(torch.nan)))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight holds NaN"):
        load(folder)


@pytest.mark.parametrize(
    ("suffix", "value"), [("weight_scale", 255), ("weight_dual_scale", torch.nan), ("mul_scale", torch.inf)]
)
def test_scales_of_4_bit_formats_are_checked(quantize, suffix, value):
    folder = quantize(Mxfp4DualScale(), DUALSCALE)
    edit(folder, change(f"layers.0.feed_forward.w2.{suffix}", lambda tensor: tensor.fill_(value)))
    with pytest.raises(CheckpointError, match=rf"w2\.{suffix} holds NaN, Inf"):
        load(folder)


def test_sharded_checkpoints_load_alike(int8_folder, tmp_path):
    model = load(int8_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = ZImageTransformer2DModel.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    assert_same_bits(model.state_dict(), again.state_dict())


def test_our_name_for_a_block_works_in_diffusers_too(quantize):
    block = {"quant_method": "omni_convert", "method": "int8", "is_checkpoint_int8_serialized": True}
    assert len(kernel_report(load(quantize(Int8(), block)))) == 28


def test_layerwise_casting_leaves_the_scales_alone(int8_folder):
    model = load(int8_folder, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "scale" in name}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert_same_bits(before, {name: tensor for name, tensor in model.state_dict().items() if "scale" in name})
    assert all(tensor.min() > 0 for tensor in before.values())


def test_casting_the_loaded_model_is_refused(int8_folder):
    with pytest.raises(ValueError, match="Casting a quantized model"):
        load(int8_folder).to(torch.float16)


def test_dequantize_gives_back_plain_linears(int8_folder, tmp_path):
    model = load(int8_folder, dtype=torch.bfloat16)
    expected = model.layers[0].feed_forward.w1.dequantize().bfloat16()
    model.dequantize()
    assert torch.equal(model.layers[0].feed_forward.w1.weight, expected)
    assert not len(kernel_report(model))
    model.save_pretrained(tmp_path / "plain")
    plain = ZImageTransformer2DModel.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(plain.layers[0].feed_forward.w1.weight, expected)


LAYER = "layers.0.feed_forward.w1"
SCALE = f"{LAYER}.weight_scale"
FINAL = "all_final_layer.2-1.linear.weight"


def add(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def drop(name):
    return lambda tensors: tensors.pop(name)


def change(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


def copy_layer(stem, new_stem):
    def copy(tensors):
        tensors |= {new_stem + n.removeprefix(stem): t.clone() for n, t in tensors.items() if n.startswith(f"{stem}.")}

    return copy


DAMAGES = {
    "no home": (add("extra.weight", torch.ones(2)), r"1 tensor that .* does not have.*extra\.weight"),
    "no such layer": (copy_layer(LAYER, "layers.9.feed_forward.w1"), r"layers\.9\.\S* is quantized, found nothing"),
    "scale missing": (drop(SCALE), rf"{LAYER}\.weight is I8 without its scale"),
    "codes missing": (drop(f"{LAYER}.weight"), "1 tensor that .* does not have"),
    "plain tensor missing": (drop(FINAL), r"found 1 tensor of \S+ missing"),
    "scale dtype": (change(SCALE, torch.Tensor.bfloat16), r"weight_scale is BF16 \[128, 1\], expected F32"),
    "scale shape": (change(SCALE, torch.flatten), r"weight_scale is F32 \[128\], expected F32 \[128, 1\]"),
    "Inf scale": (change(SCALE, lambda t: t.fill_(torch.inf)), f"{SCALE} holds NaN, Inf or a negative number"),
    "NaN scale": (change(SCALE, lambda t: t.fill_(torch.nan)), f"{SCALE} holds NaN, Inf or a negative number"),
    "negative scale": (change(SCALE, torch.neg), f"{SCALE} holds NaN, Inf or a negative number"),
    "a scale too many": (add(f"{LAYER}.input_scale", torch.ones(())), r"does not have.*input_scale"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(int8_folder, damage):
    damaging, message = DAMAGES[damage]
    edit(int8_folder, damaging)
    with pytest.raises(CheckpointError, match=message):
        load(int8_folder, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (FP8, r"holds int8, expected fp8 as its config says"),
        (INT8 | {"ignored_layers": [LAYER]}, f"{LAYER} is in ignored_layers, found int8 tensors"),
        (INT8 | {"surprise": 1}, "surprise"),
        ({"quant_method": "int8"}, "is_checkpoint_int8_serialized"),
    ],
)
def test_a_block_that_contradicts_the_tensors_is_refused(quantize, block, message):
    with pytest.raises(CheckpointError, match=message):
        load(quantize(Int8(), block))


def test_static_says_the_block_but_no_input_scale_is_there(quantize):
    with pytest.raises(CheckpointError, match="input_scale is missing"):
        load(quantize(Fp8(), FP8 | {"activation_scheme": "static"}))


def test_a_block_without_quantized_layers_is_refused(pipeline_folder, quantize):
    folder = quantize(Int8(), INT8)
    save_file(load_file(weights_file(pipeline_folder)), weights_file(folder), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="found no quantized layer"):
        load(folder)


def test_offloading_to_disk_is_refused_because_it_casts_scales(int8_folder, tmp_path):
    with pytest.raises(RecipeError, match="disk"):
        load(int8_folder, device_map={"": "disk"}, offload_folder=tmp_path)


def test_no_key_of_diffusers_or_transformers_is_replaced():
    code = (
        "from diffusers.quantizers import auto as diffusers\n"
        "from transformers.quantizers import auto as transformers\n"
        "def keys(auto):\n"
        "    return dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
        "before = keys(diffusers), keys(transformers)\n"
        "import omni_convert.loaders\n"
        "for old, new in zip(before[0], keys(diffusers)):\n"
        "    assert old.items() <= new.items()\n"
        "    assert {'fp8', 'int8', 'omni_convert'} <= new.keys() - old.keys()\n"
        "for old, new in zip(before[1], keys(transformers)):\n"
        "    assert {'fp8', 'mxfp8', 'mxfp4', 'nvfp4'} <= old.keys()\n"
        "    assert new == old | {'omni_convert': new['omni_convert']}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_modelopt_block_without_quant_algo_is_left_to_diffusers():
    assert auto.AUTO_QUANTIZER_MAPPING["modelopt"] is NVIDIAModelOptQuantizer
    block = {"quant_method": "modelopt", "quant_type": "FP8", "modelopt_config": {"algorithm": "max"}}
    config = auto.DiffusersAutoQuantizer.from_dict(block)
    assert type(config) is NVIDIAModelOptConfig


def test_the_quant_method_is_an_enum_member_as_diffusers_demands():
    config = auto.DiffusersAutoQuantizer.from_dict(FP8)
    assert config.quant_method.value == "omni_convert"
    assert json.loads(json.dumps(config.to_dict())) == FP8
    assert dict(config) == FP8
    assert FP8["quant_method"] in config.to_json_string()


def test_models_that_drop_keys_by_name_may_do_so(int8_folder, monkeypatch):
    edit(int8_folder, lambda t: t.update({"old.position_ids": torch.ones(2)}))
    monkeypatch.setattr(ZImageTransformer2DModel, "_keys_to_ignore_on_load_unexpected", [r"position_ids"])
    assert len(kernel_report(load(int8_folder))) == 28


def test_diffusers_is_the_version_whose_behaviour_was_read():
    assert re.match(r"0\.(4[2-9]|[5-9]\d)\.", diffusers.__version__)
