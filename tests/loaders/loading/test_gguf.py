from pathlib import Path
from typing import Any

import pytest
import torch

from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.errors import CheckpointError, KernelError, RecipeError
from omni_convert.loaders import build_quant_config, kernel_report, load_pipeline


def test_a_pipeline_in_gguf_runs_through_diffusers(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", device="cpu"))
    pipeline = load_pipeline(tmp_path / "out", torch_dtype=torch.float32)
    kinds = {type(module).__name__ for module in pipeline.transformer.modules()}
    assert "GGUFLinear" in kinds
    original = load_pipeline(tiny_pipeline_folder, torch_dtype=torch.float32)
    name = "layers.0.feed_forward.w1.weight"
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    found = dequantize_gguf_tensor(pipeline.transformer.get_parameter(name)).float().detach()
    wanted = original.transformer.get_parameter(name).detach()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.02
    report = kernel_report(pipeline)
    assert {(layer.format, layer.kernel) for layer in report.layers if not layer.is_as_asked} == {
        ("gguf BF16", "diffusers"),  # the refiners
        ("gguf Q8_0", "diffusers"),
    }
    with pytest.raises(KernelError, match=r"strict: \d+ of \d+ layers run no scaled GEMM: .*gguf Q8_0 runs diffusers"):
        load_pipeline(tmp_path / "out", strict=True)
    with pytest.raises(RecipeError, match="transformer is stored in GGUF"):
        load_pipeline(tmp_path / "out", quantization="fp8")


def test_a_mixture_of_super_blocks_and_simple_blocks_runs_through_diffusers(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", gguf_type="Q4_K_M", device="cpu"))
    pipeline = load_pipeline(tmp_path / "out")
    # Rows of 512 are super-blocks, rows of 192 are not.
    assert {layer.format for layer in kernel_report(pipeline).layers if layer.kernel == "diffusers"} == {
        "gguf BF16",
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
        assert ("gguf Q8_0", "diffusers") in {(layer.format, layer.kernel) for layer in kernel_report(pipeline)}
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


def test_types_that_diffusers_does_not_know_are_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("gguf", gguf_type="MXFP4", device="cpu"))
    with pytest.raises(CheckpointError, match="found MXFP4, which diffusers cannot dequantize"):
        load_pipeline(tmp_path / "out")
