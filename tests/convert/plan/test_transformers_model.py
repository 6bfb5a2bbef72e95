"""A model of transformers by itself: written as transformers finds and reads it, as inside its pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import omni_convert.loaders  # noqa: F401  # registers the quantizer
from omni_convert.convert import Recipe, convert_checkpoint

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
}


def language_model() -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, head_dim=16))


def model_with_vision() -> transformers.PreTrainedModel:
    rope = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": rope},
        vision_config={**VISION, "window_size": 16, "fullatt_block_indexes": [1]},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def encoder() -> transformers.PreTrainedModel:
    config = transformers.UMT5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.UMT5EncoderModel(config)


MODELS = {"language model": language_model, "with a vision tower": model_with_vision, "encoder": encoder}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = request.param().to(torch.bfloat16)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder


def hidden(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=torch.arange(11, 43).view(1, -1), output_hidden_states=True)
    states: torch.Tensor = found.hidden_states[-1].float()
    return states


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_transformers_loads_it_with_its_scales(model_folder: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    convert_checkpoint(model_folder, out, Recipe(method=method, runtime="diffusers"))
    assert (out / "model.safetensors").is_file()
    assert not list(out.glob("diffusion_pytorch_model*"))
    for file in ("generation_config.json", "tokenizer/vocab.json"):
        assert (out / file).read_bytes() == (model_folder / file).read_bytes()

    model_class = getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0])
    original = model_class.from_pretrained(model_folder, dtype=torch.bfloat16)
    loaded, info = model_class.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["unexpected_keys"]
    wanted = hidden(original)
    error = float((hidden(loaded) - wanted).norm() / wanted.norm())
    assert 0 < error < 0.1

    stored = load_file(out / "model.safetensors")
    quantized = [name for name, tensor in stored.items() if tensor.element_size() == 1]
    assert quantized
    assert not [name for name in quantized if "visual" in name]


def test_it_has_the_bytes_that_it_has_inside_its_pipeline(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    inside, alone = tmp_path / "inside", tmp_path / "alone"
    recipe = Recipe(method="fp8", runtime="diffusers", component={"text_encoder": "fp8"})
    convert_checkpoint(tiny_pipeline_folder, inside, recipe)
    convert_checkpoint(tiny_pipeline_folder / "text_encoder", alone, Recipe(method="fp8", runtime="diffusers"))
    for file in (inside / "text_encoder").iterdir():
        assert (alone / file.name).read_bytes() == file.read_bytes()


def test_dequantizing_gives_the_files_of_transformers(model_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(model_folder, tmp_path / "out", Recipe(method="fp8", runtime="diffusers"))
    convert_checkpoint(tmp_path / "out", tmp_path / "back", Recipe(method="dequantize"))
    original, back = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "back"))
    assert original.keys() == back.keys()
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
