"""vLLM-Omni's own code on our files, without a GPU: its configs, model classes, linear methods and weight loader.

Every family and method is held to it by scripts/vllm_omni_grid.py; here are cases of other kinds. Both are run by
scripts/nightly, with each version in an environment of its own.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.source.location import DEMO_PIPELINE, resolve_source

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings are their own affair

WEIGHTS = "diffusion_pytorch_model.safetensors"

Load = Callable[[Path, str], nn.Module]


@pytest.fixture(scope="session", autouse=True)
def _peer_comes_first(peer: ModuleType) -> None: ...


@pytest.fixture(scope="module")
def place(peer: ModuleType) -> Any:
    return peer.ModelPlace("z_image.z_image_transformer:ZImageTransformer2DModel", "ZImagePipeline")


@pytest.fixture(scope="module")
def load(runtime: Any, place: Any) -> Load:
    """A function of a folder and a device: their transformer of Z-Image, filled by their loader."""
    return lambda folder, device: runtime.load(folder, place, device)


@pytest.fixture
def assert_loaded(peer: ModuleType, place: Any, tiny_pipeline_folder: Path) -> Callable[[nn.Module, Path], None]:
    """A function of their transformer and of what we wrote: every layer stands for the same there, none is missing."""

    def check(model: nn.Module, out: Path) -> None:
        found = peer.compare(model, out / "transformer", tiny_pipeline_folder / "transformer", place)
        assert found.flaw is None, found

    return check


@pytest.fixture(scope="session")
def statistics_file(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from omni_convert.convert.calibration.recording import record_source

    folder = tmp_path_factory.mktemp("statistics")
    (folder / "prompts.txt").write_text("a red circle\n")
    recipe = Recipe(calib=folder / "prompts.txt", calib_steps=2, calib_size=(32, 32))
    record_source(resolve_source(tiny_pipeline_folder), recipe).statistics.save(folder / "stats.safetensors")
    return folder / "stats.safetensors"


@pytest.mark.parametrize("method", ["fp8", "nvfp4"])
def test_recorded_input_scales_are_loaded_by_them(
    load: Load,
    assert_loaded: Callable[[nn.Module, Path], None],
    tiny_pipeline_folder: Path,
    statistics_file: Path,
    tmp_path: Path,
    method: str,
) -> None:
    recipe = Recipe(method=method, activation_scheme="static", calibration=(statistics_file,))
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    theirs = load(tmp_path / "out", "CUDA")
    scales = [scale for name, scale in theirs.named_parameters() if name.endswith(".input_scale")]
    assert scales
    assert not any(scale.isnan().any() for scale in scales)
    assert_loaded(theirs, tmp_path / "out")


def test_a_mixture_of_ours_is_loaded_by_them(
    load: Load,
    assert_loaded: Callable[[nn.Module, Path], None],
    tiny_pipeline_folder: Path,
    statistics_file: Path,
    tmp_path: Path,
) -> None:
    parts = {}
    for method in ("fp8", "nvfp4"):
        recipe = Recipe(method=method, activation_scheme="static", calibration=(statistics_file,), dialect="modelopt")
        convert_checkpoint(tiny_pipeline_folder, tmp_path / method, recipe)
        parts[method] = load_file(tmp_path / method / "transformer" / WEIGHTS)
    tensors = {name: tensor for name, tensor in parts["fp8"].items() if ".feed_forward." not in name}
    tensors |= {name: tensor for name, tensor in parts["nvfp4"].items() if ".feed_forward." in name}
    save_file(tensors, tmp_path / "fp8" / "transformer" / WEIGHTS, metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "fp8", tmp_path / "out", Recipe(method="keep", dialect="modelopt", force=True))
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "MIXED_PRECISION"
    assert_loaded(load(tmp_path / "out", "CUDA"), tmp_path / "out")


def test_layers_that_stay_are_ignored_by_them(
    load: Load, assert_loaded: Callable[[nn.Module, Path], None], tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method="mxfp4", ignored_layers=("layers.0",))
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    theirs = load(tmp_path / "out", "NPU")  # a scale that is missing would be an error
    assert theirs.get_parameter("layers.0.attention.to_qkv.weight").dtype is torch.bfloat16
    assert not hasattr(theirs.get_submodule("layers.0.attention.to_qkv"), "weight_scale")
    assert_loaded(theirs, tmp_path / "out")


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5, 1.0])
def test_tea_cache_skips_the_steps_that_theirs_would(threshold: float) -> None:
    from vllm_omni.diffusion.cache.teacache.config import TeaCacheConfig
    from vllm_omni.diffusion.cache.teacache.hook import TeaCacheHook
    from vllm_omni.diffusion.cache.teacache.state import TeaCacheState

    from omni_convert.loaders import load_pipeline
    from omni_convert.loaders.tea_cache import MODELS, TeaCache

    pipe = load_pipeline(DEMO_PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    kind = type(pipe.transformer).__name__
    coefficients = list(MODELS[kind].coefficients)
    inputs: list[Tensor] = []

    def keep(_attention: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].float())  # theirs averages in the type of its inputs: in BF16 some steps differ

    pipe.transformer.layers[0].attention.register_forward_pre_hook(keep)
    cache = TeaCache(pipe, threshold)
    reused = [0]

    def after_step(*arguments: Any) -> dict[str, Any]:
        reused.append(cache.reused)
        return arguments[-1]

    generator = torch.Generator().manual_seed(0)
    pipe("a ring", 64, 64, num_inference_steps=12, generator=generator, callback_on_step_end=after_step)
    hook = TeaCacheHook(TeaCacheConfig(rel_l1_thresh=threshold, coefficients=coefficients, transformer_type=kind))
    state, theirs = TeaCacheState(), []
    for modulated in inputs:
        theirs.append(hook._should_compute_full_transformer(state, modulated))
        state.previous_modulated_input, state.cnt = modulated, state.cnt + 1
    assert theirs == [before == after for before, after in pairwise(reused)]
    assert len(theirs) == 12


def encoder_of_flux_2(config: Any) -> nn.Module:
    """As their pipeline builds it, with the part of the transformer's block that is for it."""
    import transformers  # after `peer`

    quantization = importlib.import_module("vllm_omni.quantization")
    encoder = importlib.import_module("vllm_omni.diffusion.models.mistral_encoder.mistral_encoder")
    settings = transformers.AutoConfig.from_pretrained(config.model, subfolder="text_encoder")
    own = quantization.resolve_component_quant_config(config.quantization_config, "text_encoder")
    model: nn.Module = encoder.MistralEncoderModel(settings, prefix="text_encoder", quant_config=own)
    return model


@pytest.mark.parametrize(("component", "layers"), [({"text_encoder": "fp8"}, 7), ({}, 0)])
def test_the_encoder_of_flux_2_is_loaded_by_them_in_fp8_and_in_bf16(
    component: dict[str, str], layers: int, runtime: Any, peer: ModuleType, tmp_path: Path
) -> None:
    import tiny_models  # after `peer`

    encoder = peer.ModelPlace(
        "mistral_encoder.mistral_encoder:MistralEncoderModel",
        build=encoder_of_flux_2,
        component="text_encoder",
        child="text_encoder",
        prefix="text_encoder.",
        own=("language_model.",),
    )
    transformer = peer.ModelPlace("flux2.flux2_transformer:Flux2Transformer2DModel", "Flux2Pipeline")
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_models.save_pipeline("flux_2_pipeline", source)
    file = source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    # A tiny Mistral ties its head to the embedding.
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    convert_checkpoint(source, out, Recipe(component=component))
    for place, count in ((transformer, 14), (encoder, layers)):
        model = runtime.load(out, place, "CUDA")
        found = peer.compare(model, out / place.component, source / place.component, place)
        assert (found.layers, found.wrong, found.unloaded, found.left_over) == (count, (), (), ())
        assert found.error < 0.03


@pytest.mark.parametrize(
    ("pipeline", "settings"),
    [
        ("QwenImageEditPlusPipeline", {"zero_cond_t": True}),  # Edit-2511
        ("QwenImageLayeredPipeline", {"use_additional_t_cond": True, "use_layer3d_rope": True}),
    ],
)
def test_variants_of_qwen_image_are_loaded_by_them(
    pipeline: str, settings: dict[str, bool], runtime: Any, peer: ModuleType, tmp_path: Path
) -> None:
    import diffusers  # after `peer`
    import tiny_models

    name, arguments = tiny_models.MODELS["qwen_image"]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**arguments, **settings).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source" / "transformer")
    index = {"_class_name": pipeline, "_diffusers_version": "0.40.0", "transformer": ["diffusers", name]}
    (tmp_path / "source" / "model_index.json").write_text(json.dumps(index))
    convert_checkpoint(tmp_path / "source", tmp_path / "out", Recipe())
    place = peer.ModelPlace("qwen_image.qwen_image_transformer:QwenImageTransformer2DModel", pipeline)
    loaded = runtime.load(tmp_path / "out", place, "CUDA")
    found = peer.compare(loaded, tmp_path / "out" / "transformer", tmp_path / "source" / "transformer", place)
    assert found.flaw is None, found
    assert found.layers == 24
    assert found.error < 0.03
