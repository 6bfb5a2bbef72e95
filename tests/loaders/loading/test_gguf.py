from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.arithmetic.ggml.k_quants import K_QUANTS
from omni_convert.formats.errors import CheckpointError, KernelError, RecipeError
from omni_convert.formats.schemes.gguf import StoredGguf
from omni_convert.loaders import build_quant_config, kernel_report, load_pipeline
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.gguf import _make_known


def test_a_pipeline_in_gguf_runs_from_its_blocks(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", device="cpu"))
    pipeline = load_pipeline(tmp_path / "out", torch_dtype=torch.float32)
    kinds = {type(module).__name__ for module in pipeline.transformer.modules()}
    assert "QuantizedLinear" in kinds
    assert "GGUFLinear" not in kinds
    original = load_pipeline(tiny_pipeline_folder, torch_dtype=torch.float32)
    name = "layers.0.feed_forward.w1"
    found = pipeline.transformer.get_submodule(name).dequantize()
    wanted = original.transformer.get_submodule(name).weight.detach()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.02
    refiner = "noise_refiner.0.feed_forward.w1.weight"  # stored in BF16
    assert torch.equal(pipeline.transformer.get_parameter(refiner), original.transformer.get_parameter(refiner))
    report = kernel_report(pipeline)
    assert {(layer.format, layer.kernel) for layer in report.layers} == {("gguf Q8_0", "decode_mm")}
    assert {layer.bytes / layer.elements for layer in report.layers} == {34 / 32}
    with pytest.raises(KernelError, match=r"strict: \d+ of \d+ layers run no scaled GEMM: gguf Q8_0 runs decode_mm"):
        load_pipeline(tmp_path / "out", strict=True)
    load_pipeline(tmp_path / "out", strict=True, activations="bf16")
    with pytest.raises(RecipeError, match="transformer is stored in GGUF"):
        load_pipeline(tmp_path / "out", quantization="fp8")


def test_a_mixture_of_super_blocks_and_simple_blocks_runs(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", gguf_type="Q4_K_M", device="cpu"))
    pipeline = load_pipeline(tmp_path / "out")
    # Rows of 512 are super-blocks, rows of 192 are not.
    assert {layer.format for layer in kernel_report(pipeline).layers} == {
        "gguf Q5_0",
        "gguf Q5_1",
        "gguf Q6_K",
    }
    sample = pipeline("a circle", height=32, width=32, num_inference_steps=1, output_type="latent").images
    assert bool(torch.as_tensor(sample).isfinite().all())


def test_a_denoiser_is_loaded_from_the_file_that_a_request_names(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", device="cpu"))
    (file,) = (tmp_path / "out" / "transformer").glob("*.gguf")
    config = build_quant_config({"method": "gguf", "gguf_model": file})
    expected = load_pipeline(tmp_path / "out").transformer.state_dict()
    for quantization in (config, {"transformer": {"method": "gguf", "gguf_model": str(file)}, "vae": None}):
        pipeline = load_pipeline(tiny_pipeline_folder, quantization=quantization)
        assert ("gguf Q8_0", "decode_mm") in {(layer.format, layer.kernel) for layer in kernel_report(pipeline)}
        found = pipeline.transformer.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(RecipeError, match="transformer is stored in GGUF, found a request for gguf"):
        load_pipeline(tmp_path / "out", quantization=config)


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        (
            {"vae": {"method": "gguf", "gguf_model": "x.gguf"}},
            RecipeError,
            "found gguf for vae, expected it for one of",
        ),
        ({"method": "gguf", "gguf_model": "x.gguf"}, CheckpointError, "x.gguf: found no such file, expected a .gguf"),
        ({"method": "gguf", "gguf_model": __file__}, CheckpointError, "found a '.py' file, expected .* .gguf file"),
    ],
    ids=["vae", "missing", "another file"],
)
def test_a_request_for_gguf_that_does_not_fit_is_refused(
    tiny_pipeline_folder: Path, quantization: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_pipeline(tiny_pipeline_folder, quantization=quantization)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_layers_of_super_blocks_stay_packed_and_are_decoded_as_the_gguf_package_reads_them(
    kind: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", gguf_type=kind, device="cpu"))
    pipeline = load_pipeline(tmp_path / "out")
    name = "layers.0.feed_forward.w2"
    layer = pipeline.transformer.get_submodule(name)
    (file,) = (tmp_path / "out" / "transformer").glob("*.gguf")
    (stored,) = (each for each in gguf.GGUFReader(file).tensors if each.name == f"{name}.weight")
    wanted = torch.from_numpy(gguf.quants.dequantize(stored.data.copy(), stored.tensor_type))
    assert layer.format.label == f"gguf {kind}"
    assert torch.equal(layer.dequantize(), wanted)
    (reported,) = (each for each in kernel_report(pipeline).layers if each.name.endswith(name))
    assert reported.kernel == "decode_mm"
    assert reported.bytes == stored.n_bytes  # as many in memory as in the file
    inputs = torch.randn(9, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = inputs.float() @ wanted.bfloat16().float().T
    torch.testing.assert_close(layer(inputs).float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", ["MXFP4", "IQ4_NL", "Q4_1"])
def test_layers_compute_what_the_gguf_package_reads_of_their_blocks(
    kind: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", gguf_type=kind, device="cpu"))
    transformer = load_pipeline(tmp_path / "out").transformer
    (file,) = (tmp_path / "out" / "transformer").glob("*.gguf")
    (stored,) = (each for each in gguf.GGUFReader(file).tensors if each.name == "layers.0.attention.qkv.weight")
    joined = torch.from_numpy(gguf.quants.dequantize(stored.data.copy(), stored.tensor_type))
    inputs = torch.randn(9, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    for part, wanted in zip("qkv", joined.chunk(3), strict=True):  # diffusers splits the blocks of the rows
        layer = transformer.get_submodule(f"layers.0.attention.to_{part}")
        assert layer.format.label == f"gguf {kind}"
        assert torch.equal(layer.dequantize(), wanted)
        expected = inputs.float() @ wanted.bfloat16().float().T
        torch.testing.assert_close(layer(inputs).float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_S", "TQ1_0"])
def test_types_that_diffusers_does_not_know_are_made_known_and_run(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    _make_known({kind})
    blocks = torch.randint(0, 60, (3, gguf.GGML_QUANT_SIZES[number][1]), dtype=torch.uint8)
    wanted = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), number))
    assert torch.equal(dequantize_gguf_tensor(GGUFParameter(blocks, quant_type=number)), wanted)
    layer = QuantizedLinear(StoredGguf(kind, (3, 256)), {"weight": blocks}, in_features=256)
    inputs = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = inputs.float() @ wanted.bfloat16().float().T
    torch.testing.assert_close(layer(inputs).float(), expected, rtol=2**-7, atol=float(expected.abs().max()) * 2**-7)


def test_types_that_nobody_dequantizes_and_impossible_scales_are_refused(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", device="cpu"))
    (file,) = (tmp_path / "out" / "transformer").glob("*.gguf")
    reader = gguf.GGUFReader(file, "r+")
    (stored,) = (each for each in reader.tensors if each.name == "layers.0.feed_forward.w1.weight")
    stored.data[3, :2] = (0, 0x7E)  # the scale is NaN
    reader.data.flush()
    with pytest.raises(
        CheckpointError, match=r"layers.0.feed_forward.w1: weight: found scales that are infinite or NaN"
    ):
        load_pipeline(tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "lumina2")
    writer.add_tensor("a.weight", np.zeros((1, 40), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    request = {"method": "gguf", "gguf_model": str(tmp_path / "file.gguf")}
    with pytest.raises(CheckpointError, match="found Q8_1, which the gguf package does not dequantize"):
        load_pipeline(tiny_pipeline_folder, quantization=request)
