"""load_pipeline quantizes while loading, tells which kernels run, and refuses what cannot be done."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from omni_convert.formats.errors import CheckpointError, KernelError, RecipeError
from omni_convert.formats.schemes.fp8 import Fp8Block
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.loaders import QuantizedLinear, kernel_report, load_pipeline, quantize_linear

INT8 = {"quant_method": "int8", "is_checkpoint_int8_serialized": True, "activation_scheme": "dynamic"}
BLOCK = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "is_checkpoint_fp8_serialized": True,
    "weight_block_size": [32, 32],
}
BLOCK_LINEARS = 28  # 4 blocks of 7


def quantized_names(module):
    return {name for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])  # these share nothing in a fused group
def test_quantizing_while_loading_gives_what_quantizing_each_layer_gives(pipeline_folder, method):
    plain = load_pipeline(pipeline_folder).transformer
    quantized = load_pipeline(pipeline_folder, quantization=method).transformer
    names = quantized_names(quantized)
    assert len(names) == BLOCK_LINEARS
    for name in names:
        expected = quantize_linear(plain.get_submodule(name), method).state_dict()
        found = quantized.get_submodule(name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[suffix].float(), found[suffix].float()) for suffix in expected)
    for name, tensor in plain.state_dict().items():
        if name.rpartition(".")[0] not in names:
            assert torch.equal(tensor, quantized.state_dict()[name])


def test_a_loaded_quantized_pipeline_can_be_saved_and_loaded(pipeline_folder, tmp_path, make_image):
    spec = {
        "transformer": {"method": "int8", "ignored_layers": ["feed_forward"]},
        "text_encoder": {"method": "fp8"},
        "vae": None,
    }
    pipeline = load_pipeline(pipeline_folder, quantization=spec)
    assert {layer.format for layer in kernel_report(pipeline) if layer.name.startswith("text_encoder")} == {"fp8"}
    assert not any("feed_forward" in name for name in quantized_names(pipeline.transformer))
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert kernel_report(again) == kernel_report(pipeline)
    assert torch.equal(make_image(again), make_image(pipeline))


def test_a_quantized_pipeline_stays_as_it_is(quantize):
    folder = quantize(Int8(), INT8)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert kernel_report(load_pipeline(folder, quantization="int8")).kernels == ("int_mm",)
    with (
        pytest.warns(UserWarning, match="already has a `quantization_config`"),
        pytest.raises(RecipeError, match=r"transformer is quantized as int8 already.*request for fp8"),
    ):
        load_pipeline(folder, quantization="fp8")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"vae": {"method": "fp8"}}, "vae cannot be quantized to fp8"),
        ({"transformer_9": {"method": "fp8"}}, "found component 'transformer_9', expected one of .*transformer"),
        ({"method": "fp8", "ignored_layers": ["img_mlp"]}, "'img_mlp' matches no layer"),
        ({"method": "fp8", "activation_scheme": "static"}, "static activations need calibration"),
    ],
    ids=str,
)
def test_a_request_that_does_not_fit_is_refused(pipeline_folder, spec, message):
    with pytest.raises(RecipeError, match=message):
        load_pipeline(pipeline_folder, quantization=spec)


def test_strict_refuses_layers_that_decode_their_weight(quantize):
    folder = quantize(Fp8Block((32, 32)), BLOCK)
    with pytest.raises(
        KernelError,
        match=rf"{BLOCK_LINEARS} of .*fp8 32x32 runs cpu_decode_mm \(block_scaled_mm runs on cuda.* and 25 more",
    ):
        load_pipeline(folder, strict=True)
    pipeline = load_pipeline(folder, strict=True, activations="bf16")
    assert kernel_report(pipeline).kernels == ("decode_weight_mm",)


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "w4a16", "ignored_layers": ["feed_forward"]},  # the others have 48 columns
        {"method": "int8", "ignored_layers": ["*"]},
    ],
    ids=["shapes", "ignored"],
)
def test_a_request_that_selects_no_layer_is_refused(pipeline_folder, spec):
    with pytest.raises(RecipeError, match=r"found no layer of ZImageTransformer2DModel to quantize to \w+.*, expected"):
        load_pipeline(pipeline_folder, quantization=spec)


def test_strict_refuses_a_pipeline_without_quantized_layers(pipeline_folder):
    with pytest.raises(KernelError, match="strict: found no quantized layer, expected some"):
        load_pipeline(pipeline_folder, strict=True)


def test_strict_accepts_scaled_gemms(quantize):
    report = kernel_report(load_pipeline(quantize(Int8(), INT8), strict=True, device="cpu"))
    assert all(layer.is_scaled_gemm for layer in report)
    assert not report.fallbacks


def test_strict_runs_a_scaled_gemm_where_decoding_is_faster(pipeline_folder, make_image):
    fastest = load_pipeline(pipeline_folder, quantization="fp8")
    assert kernel_report(fastest).kernels == ("cpu_decode_mm",)
    assert len(kernel_report(fastest).fallbacks) == BLOCK_LINEARS
    scaled = load_pipeline(pipeline_folder, quantization="fp8", strict=True)
    assert kernel_report(scaled).kernels == ("scaled_mm",)
    image = make_image(scaled)
    assert (make_image(fastest) - image).norm() < 0.02 * image.norm()


def test_strict_tells_what_each_scaled_gemm_of_the_format_lacks(pipeline_folder):
    with pytest.raises(KernelError, match=r"mxfp8_scaled_mm runs on cuda, not on cpu; npu_mxfp8 runs on npu"):
        load_pipeline(pipeline_folder, quantization="mxfp8", strict=True)


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("activations", ["quantized", "bf16"])
def test_a_pipeline_of_each_microscaling_method_runs_and_round_trips(
    tiny_pipeline_folder, tmp_path, method, activations
):
    pipeline = load_pipeline(tiny_pipeline_folder, quantization=method, activations=activations)
    report = kernel_report(pipeline)
    assert len(report) == BLOCK_LINEARS
    assert max(layer.bytes_per_weight for layer in report) <= (1.1 if method == "mxfp8" else 0.6)
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, activations=activations, strict=activations == "bf16")
    assert kernel_report(again) == report
    image = make_tiny_image(pipeline)
    assert torch.isfinite(image).all()
    assert torch.equal(make_tiny_image(again), image)
    again.transformer.save_pretrained(tmp_path / "again")
    first, second = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (tmp_path / "transformer", tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
        if first[name].dim()
    )
    weight = first["layers.0.attention.to_q.weight"]
    assert weight.dtype is (torch.uint8 if method == "nvfp4" else torch.float8_e4m3fn)


def make_tiny_image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        ["a red circle"],
        num_inference_steps=1,
        height=32,
        width=32,
        guidance_scale=1.0,
        generator=generator,
        output_type="np",
    ).images
    return torch.from_numpy(images)


def test_the_report_counts_layers_and_bytes_and_folds_alike_layers(quantize):
    folder = quantize(Int8(), INT8)
    report = kernel_report(load_pipeline(folder))
    stored = load_file(next((folder / "transformer").glob("*.safetensors")))
    stems = {name.rpartition(".")[0] for name in stored if "scale" in name}
    assert len(report) == BLOCK_LINEARS
    assert sum(layer.bytes for layer in report) == sum(
        tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[0] in stems
    )
    lines = str(report).splitlines()
    assert lines[0].split() == ["layers", "format", "kernel", "bytes", "a", "weight", "such", "as", "why"]
    assert {layer.bytes_per_weight for layer in report} == {1 + 4 / 48, 1 + 4 / 128}
    assert len(lines) == 3  # of one format, with one kernel for one reason
    assert lines[1].split()[0] == str(BLOCK_LINEARS)
    assert report[0].name in lines[1]
    assert lines[-1].startswith("28 layers, 28 in scaled GEMMs")


def test_an_unquantized_pipeline_has_an_empty_report(pipeline_folder):
    assert str(kernel_report(load_pipeline(pipeline_folder))) == "no quantized layers"


@pytest.mark.parametrize(
    "damage", ["transformer/config.json", "model_index.json", "weights", "scheduler/scheduler_config.json"]
)
def test_a_damaged_pipeline_is_refused_in_one_line_that_names_the_file(pipeline_folder, tmp_path, damage):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    file = next((folder / "transformer").glob("*.safetensors")) if damage == "weights" else folder / damage
    if damage == "weights":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_text("{")
    with pytest.raises(CheckpointError, match="again") as caught:
        load_pipeline(folder)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
