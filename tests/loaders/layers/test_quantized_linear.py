"""QuantizedLinear keeps the bits of the checkpoint through everything that users do to a module."""

import copy
import io
import pickle
import threading

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_layerwise_casting
from torch import nn

from omni_convert.formats.errors import CheckpointError, KernelError, RecipeError
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.table import LOADABLE
from omni_convert.loaders.kernels.kernel import rounded_input
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear, quantize_linear
from omni_convert.loaders.report import kernel_report

METHODS = {
    "fp8": {},
    "int8": {},
    "fp8 block": {"weight_block_size": (32, 32)},
    "mxfp8": {},
    "mxfp4": {},
    "mxfp4_dualscale": {},
    "nvfp4": {},
    "w4a16": {"group_size": 32},
}
FOUR_BIT = ("mxfp4", "mxfp4_dualscale", "nvfp4", "w4a16")


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 64, dtype=torch.bfloat16)


@pytest.fixture(params=METHODS)
def layer(request, linear) -> QuantizedLinear:
    return quantize_linear(linear, request.param.split()[0], **METHODS[request.param])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1)).bfloat16()


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.uint8) if tensor.dim() else tensor for name, tensor in module.state_dict().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_it_computes_the_linear_layer_it_was_made_from(layer, linear, x):
    out = layer(x)
    assert out.shape == (2, 7, 64)
    assert out.dtype is torch.bfloat16
    expected = linear(x).float()
    bound = 0.2 if layer.format.method in FOUR_BIT else 0.05
    assert (out.float() - expected).norm() < bound * expected.norm()


def test_its_tensors_are_those_of_the_format(layer, linear):
    expected = layer.format.quantize(linear.weight.detach())
    layout = layer.format.layout(64, 128)
    assert layer.state_dict().keys() == layout.keys() | {"bias"}
    tensors = layer.disk_tensors()
    assert tensors.keys() == layout.keys()
    for suffix, tensor in tensors.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (layout[suffix].dtype, layout[suffix].shape)
        assert torch.equal(tensor.float(), expected[suffix].float())
    assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("method", ["mxfp8", *FOUR_BIT])
def test_weights_stay_packed_in_memory(method):
    layer = quantize_linear(nn.Linear(1024, 256, bias=False), method, search=False)
    bytes_per_weight = sum(tensor.nbytes for tensor in layer.state_dict().values()) / (1024 * 256)
    assert bytes_per_weight <= (1.1 if method == "mxfp8" else 0.6)


def test_a_container_is_packed_whenever_it_is_set(linear, x):
    layer = quantize_linear(linear, "mxfp4_dualscale")
    expected, stored = layer(x), layer.disk_tensors()["weight"]
    assert (layer.weight.dtype, stored.dtype) == (torch.uint8, torch.float8_e4m3fn)
    layer.weight = torch.zeros_like(stored)
    assert not (layer(x) - layer.bias).any()
    layer.weight = stored
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.float()])
def test_a_cast_changes_the_bias_and_leaves_codes_and_scales_alone(layer, cast):
    model = nn.Sequential(layer)
    before = bits(model)
    cast(model)
    after = bits(model)
    assert layer.bias.dtype is not torch.bfloat16
    before.pop("0.bias"), after.pop("0.bias")
    assert_same_bits(before, after)


def test_layerwise_casting_does_not_zero_the_scales(layer, x):
    model = nn.Sequential(layer, nn.Linear(64, 8, dtype=torch.bfloat16))
    before = bits(layer)
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16)
    assert model[1].weight.dtype is torch.float8_e4m3fn
    assert model(x).abs().sum() > 0
    assert_same_bits(before, bits(layer))


def test_copies_and_saved_modules_compute_the_same(layer, x):
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    again = copy.deepcopy(layer)
    again.get_buffer(again.tensor_names[0]).zero_()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    pickled = pickle.loads(pickle.dumps(layer))
    assert torch.equal(pickled(x), expected)
    assert_same_bits(bits(layer), bits(pickled))
    assert all(tensor.dtype is layer.state_dict()[name].dtype for name, tensor in pickled.state_dict().items())


def test_offloaded_to_meta_and_back_it_computes_the_same(layer, x):
    expected = layer(x)
    model = cpu_offload(nn.Sequential(layer), execution_device=torch.device("cpu"), offload_buffers=True)
    assert layer.device.type == "meta"
    assert torch.equal(model(x), expected)


def test_the_kernel_is_chosen_once_and_again_on_another_device(layer, x):
    chosen = layer.selection
    layer(x)
    assert layer.selection is chosen
    layer.to("meta")
    layer.to_empty(device="cpu")
    assert layer.selection.kernel is chosen.kernel


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_it_compiles_without_a_graph_break(layer, rows):
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_more_rows_compile_once_more_at_most(layer):
    compiles = 0

    def count(graph, _inputs):
        nonlocal compiles
        compiles += 1
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    with torch.no_grad():
        for rows in (300, 301, 400, 512, 300):
            x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16()
            assert torch.equal(compiled(x), layer(x))
    assert compiles <= 2


@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp4_dualscale"])
def test_buffers_of_inference_mode_do_not_leak_into_other_modes(method):
    layer = quantize_linear(nn.Linear(128, 64, dtype=torch.bfloat16), method)
    x = torch.randn(3, 128).bfloat16()

    def run_here_and_there() -> torch.Tensor:
        with torch.inference_mode():
            inside = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), inside)
        return inside.clone()

    results = []
    threads = [threading.Thread(target=lambda: results.append(run_here_and_there())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert torch.equal(*results)


@pytest.mark.parametrize("method", ["fp8", "int8", "mxfp8", "nvfp4", "w4a16"])
def test_a_gradient_is_refused_not_made_up(linear, x, method):
    layer = quantize_linear(linear, method)
    out = layer(x.requires_grad_())
    with torch.no_grad():
        assert torch.equal(out, layer(x))
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


def test_static_activations_use_the_stored_scale(linear, x):
    tensors = Fp8().quantize(linear.weight.detach()) | {"input_scale": torch.tensor(1 / 448)}
    layer = QuantizedLinear(Fp8(static=True), tensors)
    clipped = x.clamp(-1, 1)
    assert torch.equal(layer(x), layer(clipped))
    assert not torch.equal(rounded_input(x[0], tensors, layer.format), rounded_input(x[0], tensors, Fp8()))


def test_bf16_activations_can_be_asked_for_later(layer, x):
    layer.activations = "bf16"
    expected = nn.functional.linear(x.float(), layer.dequantize(), layer.bias.float())
    assert (layer(x) - expected).norm() < 2**-8 * expected.norm()


def test_codes_as_an_input_are_refused(layer, x):
    with pytest.raises(KernelError, match="float8_e4m3fn"):
        layer(x.to(torch.float8_e4m3fn))


def test_quantize_linear_takes_a_format_and_leaves_the_layer_as_it_was(linear):
    before = linear.weight.clone()
    assert quantize_linear(linear, Fp8Block((16, 16))).weight_scale_inv.shape == (4, 8)
    assert torch.equal(linear.weight, before)


def test_quantize_linear_refuses_what_it_cannot_do(linear):
    with pytest.raises(RecipeError, match="expected one of fp8, int8"):
        quantize_linear(linear, "fp9")
    with pytest.raises(RecipeError, match="calibration"):
        quantize_linear(linear, "fp8", static=True)
    with pytest.raises(RecipeError, match="65535"):
        quantize_linear(nn.Linear(4, 65536, device="meta"), Int8())


@pytest.mark.parametrize("method", [method for method in LOADABLE if method != "fp8_storage"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_linear_refuses_weights_that_are_not_finite(method, value):
    linear = nn.Linear(512, 64, bias=False)
    linear.weight.data[3, 5] = value
    with pytest.raises(CheckpointError, match="quantize_linear: found NaN or Inf in the weight"):
        quantize_linear(linear, method)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv2d(16, 16, 3), "Conv2d"),
        (3, "int"),
        (nn.Linear(64, 64).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (nn.Linear(64, 64).double(), "float64"),
    ],
    ids=["convolution", "number", "codes", "double"],
)
def test_quantize_linear_refuses_what_is_no_linear_layer_of_floats(layer, found):
    with pytest.raises(RecipeError, match=rf"quantize_linear: found .*{found}.*, expected"):
        quantize_linear(layer, "int8")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"group": 3}, "option 'group', expected one of input_scale, .*, static"),
        ({"weight_block_size": (0, 128)}, "weight_block_size"),
        ({"weight_block_size": "128,128"}, "weight_block_size"),
        ({"activations": "fp4"}, "activations 'fp4', expected quantized or bf16"),
    ],
)
def test_quantize_linear_names_an_option_that_it_does_not_know(linear, options, found):
    with pytest.raises(RecipeError, match=found):
        quantize_linear(linear, "fp8", **options)


@pytest.mark.parametrize(("method", "width"), [("mxfp4_dualscale", 70), ("nvfp4", 70), ("w4a16", 70)])
def test_quantize_linear_names_a_width_that_does_not_divide(method, width):
    with pytest.raises(RecipeError, match=f"found {width}"):
        quantize_linear(nn.Linear(width, 64), method)


@pytest.mark.parametrize("model", [3, None, "out"])
def test_a_report_about_no_model_is_refused(model):
    with pytest.raises(RecipeError, match=r"kernel_report: found .*, expected a pipeline"):
        kernel_report(model)


def test_quantize_linear_refuses_a_bias_that_is_not_finite(linear):
    broken = copy.deepcopy(linear)
    torch.nn.init.constant_(broken.bias, torch.nan)
    with pytest.raises(CheckpointError, match="quantize_linear: found NaN or Inf in the bias"):
        quantize_linear(broken, "fp8")


@pytest.mark.parametrize(
    ("method", "options", "found"),
    [
        ("w4a16", {"group_size": 7}, "group_size: found 7, expected one of 32, 64, 128"),
        ("w4a16", {"group_size": "a"}, "group_size: found 'a'"),
        ("w4a16", {"group_size": -1}, "group_size: found -1"),
        ("w4a16", {"group_size": 0}, "group_size: found 0"),
        ("w4a16", {"group_size": True}, "group_size: found True"),
        ("fp8", {"per_channel": "no"}, "found per_channel 'no', expected True or False"),
        ("mxfp8", {"search": 3}, "found search 3, expected True or False"),
        ("fp8", {"per_channel": True, "weight_block_size": (128, 128)}, "found per_channel with weight_block_size"),
    ],
    ids=str,
)
def test_quantize_linear_refuses_options_that_mean_nothing(linear, method, options, found):
    with pytest.raises(RecipeError, match=f"^quantize_linear: .*{found}"):
        quantize_linear(linear, method, **options)
