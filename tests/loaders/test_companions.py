"""Quantized pipelines together with what users add to a pipeline: caches, offload, tiling, parallelism."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, TensorParallelConfig
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig, apply_group_offloading

from omni_convert.loaders import build_quant_config, load_pipeline
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig

CPU = torch.device("cpu")
STEPS = 6
ROWS = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
METHODS = {
    "fp8": "fp8",
    "fp8 row": ROWS,
    "fp8 block": {"method": "fp8", "weight_block_size": [32, 32]},
    "int8": "int8",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "mxfp4_dualscale": "mxfp4_dualscale",
    "nvfp4": "nvfp4",
    "w4a16": {"method": "w4a16", "group_size": 32},
}


@pytest.fixture(scope="module")
def flux_folder(make_denoiser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    make_denoiser("flux").model.save_pretrained(folder)
    return folder


@pytest.fixture(params=METHODS)
def flux(request, flux_folder):
    config = DiffusersConfig.of(build_quant_config(METHODS[request.param]))
    return FluxTransformer2DModel.from_pretrained(flux_folder, dtype=torch.bfloat16, quantization_config=config)


def denoise(model):
    """A few steps whose inputs hardly change; returns the last outcome and how often quantized layers ran."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    start = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    rest = {
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "pooled_projections": torch.zeros(1, 32).bfloat16(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.no_grad():
        for step in range(STEPS):
            with model.cache_context("cond"):
                timestep = torch.tensor([1 - step / 1000])
                out = model(hidden_states=(start * (1 - step / 1000)).bfloat16(), timestep=timestep, **rest).sample
    for hook in hooks:
        hook.remove()
    return out, calls, len(layers)


CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "mag": lambda: MagCacheConfig(
        threshold=0.5, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), retention_ratio=0.2
    ),
    "taylorseer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_skip_quantized_layers_and_change_no_more_than_in_bf16(flux, flux_folder, cache):
    reference = FluxTransformer2DModel.from_pretrained(flux_folder, dtype=torch.bfloat16)
    unquantized = denoise(reference)[0].float()
    reference.enable_cache(CACHES[cache]())
    unquantized_cached = denoise(reference)[0].float()
    exact, calls, layers = denoise(flux)
    assert calls == STEPS * layers
    flux.enable_cache(CACHES[cache]())
    cached, fewer, _ = denoise(flux)
    assert fewer < calls
    assert (cached.float() - unquantized_cached).norm() < 2 * (exact.float() - unquantized).norm()
    flux.disable_cache()
    again, calls_again, _ = denoise(flux)
    assert calls_again == calls
    assert torch.equal(again, exact)


def test_a_first_block_cache_that_never_hits_changes_nothing(flux):
    exact, calls, _ = denoise(flux)
    flux.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    cached, same, _ = denoise(flux)
    assert same == calls
    assert torch.equal(cached, exact)


@pytest.mark.parametrize("method", METHODS)
def test_offloaded_pipelines_make_the_same_picture(pipeline_folder, method, make_image):
    pipe = load_pipeline(pipeline_folder, quantization=METHODS[method])
    exact = make_image(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(make_image(pipe), exact)
    pipe.remove_all_hooks()
    apply_group_offloading(pipe.transformer, CPU, CPU, offload_type="leaf_level")
    assert torch.equal(make_image(pipe), exact)


def test_vae_tiling_and_slicing(pipeline_folder, make_image):
    pipe = load_pipeline(pipeline_folder, quantization="fp8")
    exact = make_image(pipe)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert torch.equal(make_image(pipe), exact)  # one tile


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_tensor_parallelism_is_refused_by_name(flux):
    with pytest.raises(ValueError, match="quantiz"):
        flux.enable_parallelism(config=TensorParallelConfig(tp_degree=1))
