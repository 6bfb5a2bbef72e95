"""LoRA through diffusers and PEFT: loaded, scaled and unloaded on quantized layers, never fused."""

import pickle

import pytest
import torch

from omni_convert.formats.errors import RecipeError
from omni_convert.formats.schemes.fp8 import Fp8Block
from omni_convert.formats.table import LOADABLE
from omni_convert.loaders import kernel_report, load_pipeline
from omni_convert.loaders.layers.fp8_storage import Fp8WeightStorage
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear

peft = pytest.importorskip("peft")

QUANTIZED = (QuantizedLinear, Fp8WeightStorage)
LAYERS = ("attention.to_q", "attention.to_out.0", "feed_forward.w1")
W4A16 = {"method": "w4a16", "group_size": 32}
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        "attention": {"quant_algo": "MXFP8"},
        "feed_forward": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    },
}
STORED = {"transformer": {"method": "fp8_storage"}}
VARIANTS = [{"method": "fp8", "weight_block_size": [16, 16]}, {"method": "fp8", "per_channel": True}, MIXED]
METHODS = [W4A16 if name == "w4a16" else STORED if name == "fp8_storage" else name for name in LOADABLE] + VARIANTS


def lora_of(transformer, rank=2, seed=0):
    """A LoRA file's tensors, for some layers of every block."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index in range(2):
        for layer in LAYERS:
            name = f"layers.{index}.{layer}"
            base = transformer.get_submodule(name)
            a = torch.randn(rank, base.in_features, generator=generator) * 0.2
            b = torch.randn(base.out_features, rank, generator=generator) * 0.2
            tensors |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.fixture
def pipe(pipeline_folder):
    return load_pipeline(pipeline_folder, quantization="int8")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_loaded_lora_adds_its_product_scales_and_unloads(tiny_pipeline_folder, method, make_image):
    pipe = load_pipeline(tiny_pipeline_folder, quantization=method)
    plain = make_image(pipe)
    layer = pipe.transformer.get_submodule("layers.0.attention.to_q")
    assert all(isinstance(pipe.transformer.get_submodule(f"layers.1.{name}"), QUANTIZED) for name in LAYERS)
    tensors = lora_of(pipe.transformer)
    state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}

    pipe.load_lora_weights(dict(tensors), adapter_name="style")
    wrapped = pipe.transformer.get_submodule("layers.0.attention.to_q")
    assert wrapped.get_base_layer() is layer
    a, b = (tensors[f"transformer.layers.0.attention.to_q.lora_{side}.weight"] for side in "AB")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    for scale in (1.0, 0.5):
        pipe.set_adapters("style", scale)
        expected = layer(x).float() + scale * (x.float() @ a.float().T @ b.float().T)
        assert (wrapped(x).float() - expected).norm() < 2**-6 * expected.norm()
    styled = make_image(pipe)
    assert not torch.equal(styled, plain)
    assert len(kernel_report(pipe)) == sum(isinstance(module, QUANTIZED) for module in pipe.transformer.modules())

    pipe.disable_lora()
    assert torch.equal(make_image(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(make_image(pipe), styled)
    pipe.unload_lora_weights()
    assert pipe.transformer.get_submodule("layers.0.attention.to_q") is layer
    assert all(
        torch.equal(tensor.view(-1).view(torch.uint8), state[name].view(-1).view(torch.uint8))
        for name, tensor in pipe.transformer.state_dict().items()
    )
    assert torch.equal(make_image(pipe), plain)


# PEFT's own, of what diffusers does to have two adapters.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_two_adapters_work_together(pipe, make_image):
    pipe.load_lora_weights(lora_of(pipe.transformer), adapter_name="one")
    one = make_image(pipe)
    pipe.load_lora_weights(lora_of_base(pipe, seed=1), adapter_name="two")
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.allclose(make_image(pipe), one, atol=0.02)
    pipe.set_adapters(["one", "two"], [1.0, 1.0])
    assert not torch.allclose(make_image(pipe), one, atol=0.02)


def lora_of_base(pipe, seed):
    class Bases:
        @staticmethod
        def get_submodule(name):
            return pipe.transformer.get_submodule(name).get_base_layer()

    return lora_of(Bases, seed=seed)


@pytest.mark.parametrize(("method", "name"), [("int8", "QuantizedLinear"), (STORED, "Fp8StorageLinear")], ids=str)
def test_fusing_is_refused_and_leaves_the_pipeline_as_it_was(pipeline_folder, method, name, make_image):
    pipe = load_pipeline(pipeline_folder, quantization=method)
    pipe.load_lora_weights(lora_of(pipe.transformer))
    styled = make_image(pipe)
    with pytest.raises(RecipeError, match=f"fuse_lora: found {name}"):
        pipe.fuse_lora()
    assert torch.equal(make_image(pipe), styled)


def test_add_adapter_takes_quantized_layers_and_only_the_adapter_learns(pipe):
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
    learning = [name for name, parameter in pipe.transformer.named_parameters() if parameter.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)


@pytest.mark.parametrize(
    ("method", "options"),
    [("int8", {"use_dora": True}), ("int8", {"init_lora_weights": "pissa"}), (STORED, {"init_lora_weights": "pissa"})],
    ids=str,
)
def test_what_needs_the_weight_itself_is_refused(pipeline_folder, method, options):
    pipe = load_pipeline(pipeline_folder, quantization=method)
    with pytest.raises(RecipeError, match="expected plain LoRA on a quantized model"):
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], **options))


def test_a_model_with_an_adapter_can_be_compiled_and_pickled(pipeline_folder):
    pipe = load_pipeline(pipeline_folder, quantization={"method": "fp8", "weight_block_size": [16, 16]})
    pipe.load_lora_weights(lora_of(pipe.transformer))
    layer = pipe.transformer.get_submodule("layers.0.attention.to_q")
    assert isinstance(layer.get_base_layer().format, Fp8Block)
    x = torch.randn(3, layer.in_features).bfloat16()
    torch.compiler.reset()
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
