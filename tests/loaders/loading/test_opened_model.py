"""Denoising models in the spelling of other tools, which `load_pipeline` reads layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.loaders import QuantizedLinear, kernel_report, load_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Method and dialect, and how far a step of the denoising model may be off, most of it by rounded inputs.
WRITTEN: dict[str, tuple[dict[str, Any], float]] = {
    "fp8": ({"method": "fp8"}, 0.1),
    "e5m2": ({"method": "fp8", "element": "e5m2"}, 0.2),
    "int8": ({"method": "int8"}, 0.1),
    "rotated int8": ({"method": "int8", "rotate": True}, 0.1),
    "mxfp8": ({"method": "mxfp8"}, 0.1),
    "nvfp4": ({"method": "nvfp4"}, 0.05),
    "convrot_w4a4": ({"method": "convrot_w4a4"}, 0.5),
    "w4a8": ({"method": "w4a8"}, 0.1),
    "w6a8": ({"method": "w6a8"}, 0.1),
    "auto-round mxfp8": ({"method": "mxfp8", "dialect": "auto-round"}, 0.1),
    "auto-round mxfp4": ({"method": "mxfp4", "dialect": "auto-round"}, 0.5),
    "auto-round nvfp4": ({"method": "nvfp4", "dialect": "auto-round"}, 0.5),
}


def converted(source: Path, output: Path, **options: Any) -> Path:
    options = {"dialect": "comfyui", "device": "cpu", "search": False, **options}
    if options["dialect"] == "auto-round" and options["method"] == "nvfp4":
        prompts = output.with_name("prompts.txt")
        prompts.write_text("a cat\n")
        options |= {"calib": prompts, "calib_steps": 1, "calib_size": (32, 32)}
    convert_checkpoint(source, output, Recipe(**options))
    return output


def latents(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 0.0}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", **size, generator=generator, output_type="latent").images.float()


QUICK = ("rotated int8", "nvfp4", "w4a8", "auto-round mxfp4")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WRITTEN]


@pytest.mark.parametrize("name", CASES)
def test_it_runs_as_it_is_stored(tiny_pipeline_folder: Path, tmp_path: Path, name: str) -> None:
    options, bound = WRITTEN[name]
    out = converted(tiny_pipeline_folder, tmp_path / "out", **options)
    convert_checkpoint(out, tmp_path / "plain", Recipe("dequantize", device="cpu"))
    plain = load_file(tmp_path / "plain" / "transformer" / WEIGHTS)
    pipeline = load_pipeline(out)
    layers = {name: each for name, each in pipeline.transformer.named_modules() if isinstance(each, QuantizedLinear)}
    assert len(layers) == len(kernel_report(pipeline).layers) > 10
    for stem, layer in layers.items():
        stored = plain[f"{stem}.weight"].float()
        torch.testing.assert_close(layer.dequantize(), stored, rtol=2**-8, atol=2**-9 * float(stored.abs().max()))
    others = {stem: tensor for stem, tensor in pipeline.transformer.state_dict().items() if stem in plain}
    kept = {stem: tensor for stem, tensor in others.items() if stem.removesuffix(".weight") not in layers}
    assert kept
    assert all(tensor.equal(plain[stem].to(tensor.dtype)) for stem, tensor in kept.items())
    expected = latents(load_pipeline(tmp_path / "plain"))
    assert float((latents(pipeline) - expected).norm() / expected.norm()) < bound


@pytest.fixture(scope="module")
def rotated(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tiny_pipeline_folder, tmp_path_factory.mktemp("rotated") / "out", method="int8", rotate=True)


def test_it_is_neither_quantized_again_nor_saved(rotated: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="transformer is quantized already, as comfyui spells it"):
        load_pipeline(rotated, quantization="fp8")
    model = load_pipeline(rotated).transformer
    with pytest.raises(ValueError, match="quantized with comfyui and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    weight = model.layers[0].attention.to_q.dequantize()
    model.dequantize()
    assert model.layers[0].attention.to_q.weight.equal(weight.bfloat16())
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHTS).is_file()


def rewritten(source: Path, output: Path, change: Any) -> Path:
    """The pipeline with changed tensors; everything but the transformer's weights is linked."""
    (output / "transformer").mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "transformer":
            (output / path.name).symlink_to(path)
    (output / "transformer" / "config.json").symlink_to(source / "transformer" / "config.json")
    tensors = load_file(source / "transformer" / WEIGHTS)
    change(tensors)
    save_file(tensors, output / "transformer" / WEIGHTS, {"format": "pt"})
    return output


def test_layers_that_are_marked_so_multiply_in_full_precision(rotated: Path, tmp_path: Path) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("layers.0.attention.qkv.comfy_quant")]:
            content = {**json.loads(bytes(tensors[name].tolist())), "full_precision_matrix_mult": True}
            tensors[name] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    attention = load_pipeline(rewritten(rotated, tmp_path / "marked", mark)).transformer.layers[0].attention
    assert (attention.to_q.activations, attention.to_out[0].activations) == ("bf16", "quantized")


DAMAGE = {
    "a lost scale": (lambda tensors: tensors.pop("layers.0.attention.qkv.weight_scale"), "qkv"),
    "a lost norm": (lambda tensors: tensors.pop("layers.0.attention_norm1.weight"), "attention_norm1"),
    "a lost layer": (
        lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("layers.1.feed_forward.w2.")],
        "w2",
    ),
    "an infinite scale": (
        lambda tensors: tensors["layers.0.attention.qkv.weight_scale"].view(-1)[:1].fill_(torch.inf), "qkv",
    ),
    "a stray scale": (lambda tensors: tensors.update({"layers.0.attention.qkv.smooth_factor": torch.ones(192)}), "qkv"),
}  # fmt: skip


def test_a_level_that_is_no_number_is_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.feed_forward.w2.weight_codebook"][3] = torch.nan

    out = converted(tiny_pipeline_folder, tmp_path / "out", method="w4a8")
    with pytest.raises(CheckpointError, match=r"feed_forward\.w2.weight_codebook.*NaN"):
        load_pipeline(rewritten(out, tmp_path / "damaged", damage))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused(rotated: Path, tmp_path: Path, damage: tuple[Any, str]) -> None:
    change, named = damage
    with pytest.raises(CheckpointError, match=named) as caught:
        load_pipeline(rewritten(rotated, tmp_path / "damaged", change))
    assert "\n" not in str(caught.value)
