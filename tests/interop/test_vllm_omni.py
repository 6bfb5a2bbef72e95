"""vLLM-Omni's own code on our files, without a GPU: its configs, model classes, linear methods and weight loader.

What runs on a device only is left out: the kernels, and what the linear methods do with loaded weights for them. Where
none of their kernels is for this machine, another of theirs takes the place, and is not run either. Run by
scripts/nightly, in an environment of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.source.location import DEMO_PIPELINE, resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.families.table import find_family
from omni_convert.formats.views.base import dequantized_view
from omni_convert.loaders import load_pipeline
from omni_convert.loaders.tea_cache import MODELS as TEA_CACHE_MODELS
from omni_convert.loaders.tea_cache import TeaCache

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings are their own affair

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {
    "ZImageTransformer2DModel": ("ZImagePipeline", "z_image.z_image_transformer"),
    "QwenImageTransformer2DModel": ("QwenImagePipeline", "qwen_image.qwen_image_transformer"),
    "FluxTransformer2DModel": ("FluxPipeline", "flux.flux_transformer"),
    "Flux2Transformer2DModel": ("Flux2Pipeline", "flux2.flux2_transformer"),
    "WanTransformer3DModel": ("WanPipeline", "wan2_2.wan2_2_transformer"),
}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}
TINY: dict[str, dict[str, Any]] = {
    "QwenImageTransformer2DModel": {
        **HEADS,
        "num_layers": 2,
        "joint_attention_dim": 64,
        "in_channels": 16,
        "out_channels": 4,
        "axes_dims_rope": (8, 12, 12),
    },
    "FluxTransformer2DModel": {
        **HEADS,
        "num_layers": 1,
        "num_single_layers": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "in_channels": 16,
        "axes_dims_rope": (8, 12, 12),
        "guidance_embeds": True,
    },
    "Flux2Transformer2DModel": {
        **HEADS,
        "num_layers": 1,
        "num_single_layers": 2,
        "joint_attention_dim": 64,
        "in_channels": 16,
        "axes_dims_rope": (8, 8, 8, 8),
    },
    "WanTransformer3DModel": {**HEADS, "num_layers": 2, "text_dim": 64, "freq_dim": 64, "ffn_dim": 256},
}
# The device that each method is for: their configs choose the linear method by it.
DEVICES = {"fp8": "CUDA", "int8": "NPU", "mxfp8": "NPU", "mxfp4": "NPU", "mxfp4_dualscale": "NPU"}
# What they have on CUDA beside, as conversions of Z-Image.
ON_CUDA: dict[str, dict[str, Any]] = {
    "static fp8": {"method": "fp8", "activation_scheme": "static"},
    "fp8 blocks": {"method": "fp8", "weight_block_size": (32, 32)},
    "nvfp4": {"method": "nvfp4", "activation_scheme": "static"},
    "weight-only nvfp4": {"method": "nvfp4"},
    "ModelOpt's static fp8": {"method": "fp8", "activation_scheme": "static", "dialect": "modelopt"},
    "ModelOpt's dynamic fp8": {"method": "fp8", "dialect": "modelopt"},
}


@pytest.fixture(scope="session")
def device(import_peer_once, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:  # type: ignore[no-untyped-def]
    """A platform for this machine, as their plugins add one; call it with the name of the device to take it for."""
    platforms = import_peer_once("vllm_omni.platforms")
    interface = import_peer_once("vllm_omni.platforms.interface")

    class Cpu(interface.UnspecifiedOmniPlatform):  # type: ignore[misc, name-defined]
        @classmethod
        def get_diffusion_attn_backend_cls(cls, *_: object, **__: object) -> str:
            return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

        @classmethod
        def get_device_count(cls) -> int:
            return 1

        @classmethod
        def set_device(cls, device: torch.device) -> None:
            pass

    platforms._current_omni_platform = Cpu()
    # An operator of the compiled kernels that the model classes look up when they are built, and nothing here calls.
    torch.library.define("_C::silu_and_mul", "(Tensor! out, Tensor x) -> ()")
    for name in ("int8_config", "mxfp8_config", "mxfp4_config"):  # on an NPU they would import its torch
        import_peer_once(f"vllm_omni.quantization.{name}")

    def take_for(name: str) -> None:
        Cpu._omni_enum = interface.OmniPlatformEnum[name]

    parallel = import_peer_once("vllm_omni.diffusion.distributed.parallel_state")
    config = import_peer_once("vllm.config")
    rendezvous = tmp_path_factory.mktemp("group") / "file"
    with config.set_current_vllm_config(config.VllmConfig()):
        parallel.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        parallel.initialize_model_parallel(backend="gloo")
    yield take_for
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def import_peer_once():  # type: ignore[no-untyped-def]  # a function
    import importlib

    def load(name: str) -> Any:
        return importlib.import_module(name)

    return load


@pytest.fixture
def load(import_peer_once, device):  # type: ignore[no-untyped-def]  # a function
    """Their transformer, built from our config and filled from our files by their loader, strict as it is."""
    data = import_peer_once("vllm_omni.diffusion.data")
    configs = import_peer_once("vllm_omni.diffusion.vllm_config")
    loading = import_peer_once("vllm_omni.diffusion.model_loader.diffusers_loader")
    settings = import_peer_once("vllm.config")
    weights_loader = import_peer_once("vllm.model_executor.models.utils").AutoWeightsLoader
    keywords_of = import_peer_once("vllm_omni.diffusion.utils.tf_utils").get_transformer_config_kwargs

    class Pipeline(nn.Module):
        """The part of a pipeline class of theirs that concerns the transformer."""

        def __init__(self, config: Any, model_class: Any) -> None:
            super().__init__()
            source = loading.DiffusersPipelineLoader.ComponentSource
            self.weights_sources = [source(config.model, "transformer", None, "transformer.", True)]
            keywords = keywords_of(config.tf_model_config, model_class)
            if "od_config" in inspect.signature(model_class).parameters:
                keywords["od_config"] = config
            self.transformer = model_class(quant_config=config.quantization_config, **keywords)

        def load_weights(self, weights: Any) -> Any:
            return weights_loader(self).load_weights(weights)

    def load_by_them(folder: Path, model: str, device_name: str) -> nn.Module:
        device(device_name)
        config = data.OmniDiffusionConfig.from_kwargs(model=str(folder))
        config.enrich_config()
        assert config.quantization_config_is_auto_detected
        base = configs.create_base_diffusion_vllm_config(torch.device("cpu"), config)
        base = configs.configure_diffusion_vllm_config(base, config) or base
        module = f"vllm_omni.diffusion.models.{MODELS[model][1]}"
        # Pipelines of the package may want torchvision, of which a build suits one torch alone. Models do not.
        with contextlib.suppress(ModuleNotFoundError):
            import_peer_once(module)
        model_class = getattr(import_peer_once(module), model)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with settings.set_current_vllm_config(base):
                pipeline = Pipeline(config, model_class)
                loader = loading.DiffusersPipelineLoader(settings.LoadConfig(), config)
                loader.counter_before_loading_weights = 0.0
                loader.load_weights(pipeline)
        finally:
            torch.set_default_dtype(torch.float32)
        return pipeline.transformer

    return load_by_them


@pytest.fixture
def kernels(import_peer_once, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A kernel of theirs for every linear method, as there is one on the device."""
    linear = import_peer_once("vllm.model_executor.kernels.linear")
    cpu = import_peer_once("vllm.platforms.interface").PlatformEnum.CPU
    blocks = import_peer_once("vllm.model_executor.kernels.linear.scaled_mm.cpu").CPUFp8BlockScaledMMKernel

    class AnyCpu(blocks):  # type: ignore[misc, valid-type]
        """Without AMX, and for blocks of any size."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, None]:
            return True, None

    monkeypatch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, cpu, [AnyCpu])
    monkeypatch.setitem(linear._POSSIBLE_NVFP4_KERNELS, cpu, [linear.EmulationNvFp4LinearKernel])
    monkeypatch.setattr(linear, "MarlinNvFp4LinearKernel", linear.EmulationNvFp4LinearKernel)


@pytest.fixture(scope="session")
def statistics_file(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    (folder / "prompts.txt").write_text("a red circle\n")
    recipe = Recipe(calib=folder / "prompts.txt", calib_steps=2, calib_size=(32, 32))
    record_source(resolve_source(tiny_pipeline_folder), recipe).statistics.save(folder / "stats.safetensors")
    return folder / "stats.safetensors"


@pytest.fixture
def tiny_folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    def folder(model: str) -> Path:
        import diffusers

        if model == "ZImageTransformer2DModel":
            return tiny_pipeline_folder
        saved = tmp_path / "tiny"
        torch.manual_seed(0)
        getattr(diffusers, model)(**TINY[model]).to(torch.bfloat16).save_pretrained(saved / "transformer")
        index = {"_class_name": MODELS[model][0], "_diffusers_version": "0.40.0", "transformer": ["diffusers", model]}
        (saved / "model_index.json").write_text(json.dumps(index))
        return saved

    return folder


def spread(scale: Tensor, width: int, size: int) -> Tensor:
    """Columns of a scale, each over `size` columns of the weight; the last may be cut short."""
    return scale.repeat_interleave(size, dim=1)[:, :width]


def weight_of(method: str, layer: nn.Module, rows: list[int]) -> Tensor:
    """The weight that a linear of theirs stands for, float32 [out, in], from its parameters alone."""
    parts = {name: tensor.detach() for name, tensor in layer.named_parameters(recurse=False)}
    weight = parts["weight"].float()
    width = weight.shape[1]
    if method == "int8":
        return weight * parts["weight_scale"]
    if method == "nvfp4":
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

        return torch.cat(
            [
                dequantize_to_dtype(codes, scale, overall, torch.float32, swizzle=False)
                for codes, scale, overall in zip(
                    parts["weight"].split(rows), parts["weight_scale"].split(rows), parts["weight_scale_2"], strict=True
                )
            ]
        )
    if "weight_scale_inv" in parts:
        height, size = layer.weight_block_size
        scale = parts["weight_scale_inv"].repeat_interleave(height, dim=0)[: len(weight)]
        return weight * spread(scale, width, size)
    if method == "fp8":
        slots = parts["weight_scale"]
        if len(slots) == len(weight):
            return weight * slots.view(-1, 1)
        return weight * torch.cat([slots[slot].expand(count, 1) for slot, count in enumerate(rows)])
    exponents = parts["weight_scale"]
    assert exponents.dtype is torch.uint8
    weight = weight * spread(torch.exp2(exponents.float() - 127), width, 32)
    if method == "mxfp4_dualscale":
        weight = weight * spread(parts["weight_dual_scale"].reshape(len(weight), -1), width, 512)
    return weight * parts["mul_scale"].float() if "mul_scale" in parts else weight


def assert_they_hold_what_we_wrote(model: nn.Module, folder: Path) -> None:
    family = find_family(json.loads((folder / "config.json").read_text())["_class_name"])
    with open_quantized(folder) as opened:
        specs = {name: opened.checkpoint[name] for name in opened.checkpoint}
        groups = [
            group for group in family.layer_groups(specs, "vllm-omni") if set(group.members) <= opened.layers.keys()
        ]
        assert sum(len(group.members) for group in groups) == len(opened.layers) > 0
        for group in groups:
            layers = [opened.layers[stem] for stem in group.members]
            ours = torch.cat([layer.dequantize(0, layer.shape[0]) for layer in layers])
            # Qwen-Image's parameters are called otherwise than the prefix that their config sees.
            names = dict(model.named_modules())
            module = names[group.runtime_name if group.runtime_name in names else group.runtime_name[:-2]]
            widths = getattr(module, "logical_widths", None) or [layer.shape[0] for layer in layers]
            theirs = weight_of(layers[0].format.method, module, list(widths))
            torch.testing.assert_close(theirs, ours, rtol=2**-20, atol=0, msg=lambda text, g=group: f"{g}: {text}")
            if "input_scale" in layers[0].tensors:
                scales = torch.stack([layer.read_tensor("input_scale", 0, 0) for layer in layers])
                assert module.get_parameter("input_scale").unique().equal(scales.unique()), group


@pytest.mark.parametrize("method", DEVICES)
def test_a_method_of_ours_is_loaded_by_them(load, tiny_folder, tmp_path: Path, method: str) -> None:  # type: ignore[no-untyped-def]
    model = "ZImageTransformer2DModel"
    convert_checkpoint(tiny_folder(model), tmp_path / "out", Recipe(method=method))
    theirs = load(tmp_path / "out", model, DEVICES[method])
    assert_they_hold_what_we_wrote(theirs, tmp_path / "out" / "transformer")


@pytest.mark.parametrize("case", ON_CUDA)
def test_what_has_no_kernel_here_is_loaded_by_them(  # type: ignore[no-untyped-def]
    load, kernels, tiny_folder, statistics_file: Path, tmp_path: Path, case: str
) -> None:
    model, options = "ZImageTransformer2DModel", ON_CUDA[case]
    calibration = (statistics_file,) if options.get("activation_scheme") == "static" else ()
    convert_checkpoint(tiny_folder(model), tmp_path / "out", Recipe(**options, calibration=calibration))
    theirs = load(tmp_path / "out", model, "CUDA")
    scales = [scale for name, scale in theirs.named_parameters() if name.endswith(".input_scale")]
    assert any(not scale.isnan().any() for scale in scales) == bool(calibration)  # NaN is what nobody reads
    assert_they_hold_what_we_wrote(theirs, tmp_path / "out" / "transformer")


def test_a_mixture_of_ours_is_loaded_by_them(  # type: ignore[no-untyped-def]
    load, kernels, tiny_folder, statistics_file: Path, tmp_path: Path
) -> None:
    model = "ZImageTransformer2DModel"
    parts = {}
    for method in ("fp8", "nvfp4"):
        recipe = Recipe(method=method, activation_scheme="static", calibration=(statistics_file,), dialect="modelopt")
        convert_checkpoint(tiny_folder(model), tmp_path / method, recipe)
        parts[method] = load_file(tmp_path / method / "transformer" / WEIGHTS)
    tensors = {name: tensor for name, tensor in parts["fp8"].items() if ".feed_forward." not in name}
    tensors |= {name: tensor for name, tensor in parts["nvfp4"].items() if ".feed_forward." in name}
    save_file(tensors, tmp_path / "fp8" / "transformer" / WEIGHTS, metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "fp8", tmp_path / "out", Recipe(method="keep", dialect="modelopt", force=True))
    folder = tmp_path / "out" / "transformer"
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert block["quant_algo"] == "MIXED_PRECISION"
    assert_they_hold_what_we_wrote(load(tmp_path / "out", model, "CUDA"), folder)


@pytest.mark.parametrize("model", ["ZImageTransformer2DModel", "FluxTransformer2DModel"])
def test_w4a16_of_ours_is_loaded_by_them(load, tiny_folder, tmp_path: Path, model: str) -> None:  # type: ignore[no-untyped-def]
    convert_checkpoint(tiny_folder(model), tmp_path / "out", Recipe(method="w4a16", group_size=32))
    modules = dict(load(tmp_path / "out", model, "CUDA").named_modules())
    folder = tmp_path / "out" / "transformer"
    family = find_family(model)
    with open_quantized(folder) as opened:
        groups = family.layer_groups(dequantized_view(opened), "vllm-omni", {"w4a16"}, "auto-round")
        groups = [group for group in groups if group.members[0] in opened.layers]
        assert sum(len(group.members) for group in groups) == len(opened.layers) > 0
        for group in groups:
            for leaf in ("qweight", "qzeros", "scales"):
                ours = torch.cat([opened.checkpoint.read(f"{stem}.{leaf}") for stem in group.members], dim=1)
                theirs = modules[group.runtime_name].get_parameter(leaf)
                assert theirs.equal(ours.to(theirs.dtype)), f"{group}: {leaf}"  # scales become bfloat16


@pytest.mark.parametrize("method", ["fp8", "mxfp8"])
@pytest.mark.parametrize("model", TINY)
def test_a_family_of_ours_is_loaded_by_them(load, tiny_folder, tmp_path: Path, model: str, method: str) -> None:  # type: ignore[no-untyped-def]
    convert_checkpoint(tiny_folder(model), tmp_path / "out", Recipe(method=method))
    theirs = load(tmp_path / "out", model, DEVICES[method])
    assert_they_hold_what_we_wrote(theirs, tmp_path / "out" / "transformer")


def test_layers_that_stay_are_ignored_by_them(load, tiny_folder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, recipe = "ZImageTransformer2DModel", Recipe(method="mxfp4", ignored_layers=("layers.0",))
    convert_checkpoint(tiny_folder(model), tmp_path / "out", recipe)
    theirs = load(tmp_path / "out", model, "NPU")  # a scale that is missing would be an error
    assert theirs.get_parameter("layers.0.attention.to_qkv.weight").dtype is torch.bfloat16
    assert not hasattr(theirs.get_submodule("layers.0.attention.to_qkv"), "weight_scale")
    assert_they_hold_what_we_wrote(theirs, tmp_path / "out" / "transformer")


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5, 1.0])
def test_tea_cache_skips_the_steps_that_theirs_would(threshold: float) -> None:
    from vllm_omni.diffusion.cache.teacache.config import TeaCacheConfig
    from vllm_omni.diffusion.cache.teacache.hook import TeaCacheHook
    from vllm_omni.diffusion.cache.teacache.state import TeaCacheState

    pipe = load_pipeline(DEMO_PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    kind = type(pipe.transformer).__name__
    coefficients = list(TEA_CACHE_MODELS[kind].coefficients)
    inputs: list[Tensor] = []

    def keep(_attention: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    pipe.transformer.layers[0].attention.register_forward_pre_hook(keep)
    cache = TeaCache(pipe, threshold)
    reused = [0]

    def after_step(*arguments: Any) -> dict[str, Any]:
        reused.append(cache.reused)
        return arguments[-1]

    pipe("a ring", height=64, width=64, num_inference_steps=12, callback_on_step_end=after_step)
    hook = TeaCacheHook(TeaCacheConfig(rel_l1_thresh=threshold, coefficients=coefficients, transformer_type=kind))
    state, theirs = TeaCacheState(), []
    for modulated in inputs:
        theirs.append(hook._should_compute_full_transformer(state, modulated))
        state.previous_modulated_input, state.cnt = modulated, state.cnt + 1
    assert theirs == [before == after for before, after in pairwise(reused)]
    assert len(theirs) == 12
