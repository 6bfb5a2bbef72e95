"""A model whose weights stay in their files is the model that the libraries load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.loaders import kernel_report, load_pipeline
from omni_convert.loaders.loading.streamed import PipelineStream, streamer_of
from omni_convert.loaders.memory import budget
from omni_convert.loaders.memory.streaming import Streamer

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
T5 = {"vocab_size": 64, "d_model": 64, "d_ff": 64, "d_kv": 32, "num_layers": 2, "num_heads": 2}
VISION = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}


def qwen_2_5_vl() -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


ENCODERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
    "clip": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=2)
    ),
    "qwen_3_tied": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, tie_word_embeddings=True)),
    "qwen_2_5_vl": qwen_2_5_vl,
}
#: Denoisers with their smallest sizes; Wan keeps some layers in float32.
DENOISERS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "in_channels": 4,
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    },
    "WanTransformer3DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "text_dim": 16,
    },
    "UNet2DConditionModel": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
}


def save_component(name: str, model: Any, folder: Path, library: str) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    model.save_pretrained(folder / name)
    index = {"_class_name": "DiffusionPipeline", name: [library, type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))


def stream_component(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Streamer]:
    streamer, models = PipelineStream(folder, CPU, dtype, {}).open("stream", None)
    assert streamer is not None
    return models[name], streamer


def assert_same_model(streamed: Any, streamer: Streamer, loaded: Any) -> None:
    """Every tensor of every part is that of the model that its library loads."""
    assert type(streamed).__name__ == type(loaded).__name__
    assert not streamed.training
    expected = dict(loaded.named_parameters(remove_duplicate=False)) | dict(loaded.named_buffers())
    seen = set()
    for part in streamer.parts:
        streamer.enter(part)
        for name, tensor in (*streamed.named_parameters(remove_duplicate=False), *streamed.named_buffers()):
            if not tensor.is_meta:
                assert tensor.dtype == expected[name].dtype, name
                assert torch.equal(tensor, expected[name]), name
                seen.add(name)
    assert seen == expected.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_is_the_one_that_diffusers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model_class = getattr(diffusers, name)
    save_component("transformer", model_class(**DENOISERS[name]), tmp_path, "diffusers")
    loaded = model_class.from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    assert_same_model(*stream_component(tmp_path, "transformer", dtype), loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_encoder_is_the_one_that_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = ENCODERS[name]()
    save_component("text_encoder", model, tmp_path, "transformers")
    loaded = type(model).from_pretrained(tmp_path / "text_encoder", dtype=dtype)
    assert_same_model(*stream_component(tmp_path, "text_encoder", dtype), loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_streamed_pipeline_makes_the_same_image(tiny_pipeline_folder: Path, dtype: torch.dtype) -> None:
    images = []
    for memory in ("full", "stream"):
        pipe = load_pipeline(tiny_pipeline_folder, torch_dtype=dtype, memory=memory)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        images.append(np.asarray(pipe("a", width=32, height=32, num_inference_steps=2, generator=noise).images[0]))
    assert np.array_equal(*images)
    assert streamer_of(pipe) is not None


@pytest.mark.parametrize("method", ["fp8", "int8", "nvfp4", "mxfp4", "w4a16"])
def test_a_quantized_denoiser_makes_the_same_image(method: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """The E2M1 codes of MXFP4 are packed when they come; the others stay as they are in the file."""
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method=method))
    images, reports = [], []
    for memory in ("full", "stream"):
        pipe = load_pipeline(tmp_path / "out", memory=memory)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        images.append(np.asarray(pipe("a", width=32, height=32, num_inference_steps=2, generator=noise).images[0]))
        reports.append([(layer.name, layer.format, layer.kernel) for layer in kernel_report(pipe)])
    assert np.array_equal(*images)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("component", [{"text_encoder": "fp8"}, {"transformer": "fp8_storage"}], ids=str)
def test_other_quantized_models_are_loaded_whole(
    component: dict[str, str], tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method="fp8", runtime="diffusers", component=component)
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    (name,) = component
    with pytest.raises(
        RecipeError, match=f"holds '{name}' quantized in a form that is not streamed; use memory='full'"
    ):
        load_pipeline(tmp_path / "out", memory="stream")
    assert streamer_of(load_pipeline(tmp_path / "out", memory="auto")) is None


def test_a_component_of_the_caller_is_not_streamed(tiny_pipeline_folder: Path) -> None:
    given = diffusers.ZImageTransformer2DModel.from_pretrained(
        tiny_pipeline_folder / "transformer", torch_dtype=torch.bfloat16
    )
    pipe = load_pipeline(tiny_pipeline_folder, memory="stream", transformer=given)
    streamer = streamer_of(pipe)
    assert streamer is not None
    assert pipe.transformer is given
    assert [part.nbytes for part in streamer.parts if part.component == "transformer"] == [0]


def test_what_fits_is_not_streamed(tiny_pipeline_folder: Path) -> None:
    assert streamer_of(load_pipeline(tiny_pipeline_folder, memory="auto")) is None


def test_auto_says_that_it_streams(
    tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda _: 1 << 20)
    assert streamer_of(load_pipeline(tiny_pipeline_folder, memory="auto")) is not None
    assert "0.0 GB of weights (text_encoder 0.0 GB, transformer 0.0 GB) do not fit in the 0.0 GB that" in caplog.text


def test_quantizing_while_loading_is_not_streamed(tiny_pipeline_folder: Path) -> None:
    with pytest.raises(RecipeError, match="is quantized while it loads; use memory='full' or 'auto'"):
        load_pipeline(tiny_pipeline_folder, memory="stream", quantization="fp8")
    assert streamer_of(load_pipeline(tiny_pipeline_folder, memory="auto", quantization="fp8")) is None


def test_a_missing_tensor_is_named(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline_folder, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["layers.1.feed_forward.w2.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"found no 'layers\.1\.feed_forward\.w2\.weight' of ZImage"):
        load_pipeline(folder, memory="stream")
