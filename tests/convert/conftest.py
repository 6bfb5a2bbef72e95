"""Fixtures that tests of the converter share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omni_convert.convert.recipe import Recipe

#: Conversions to formats that have a spelling, a packing or a file of their own.
RECIPES = {
    "rotated int8": Recipe("int8", dialect="comfyui", rotate=True),
    **{method: Recipe(method) for method in ("convrot_w4a4", "w4a8", "w6a8", "nf4")},
    "nested nf4": Recipe("nf4", double_quant=True),
    **{f"auto-round {method}": Recipe(method, dialect="auto-round") for method in ("mxfp8", "mxfp4", "nvfp4")},
    **{f"gguf {kind}": Recipe("gguf", gguf_type=kind) for kind in ("Q2_K", "Q3_K_M", "Q4_K_S", "Q5_K_M", "Q6_K")},
    **{f"gguf {kind}": Recipe("gguf", gguf_type=kind) for kind in ("IQ4_NL", "IQ4_XS")},
    "w4a16 by gptq": Recipe("w4a16", rounding="gptq"),
    "nested nf4 by statistics": Recipe("nf4", double_quant=True),
}
# The one that stores what was calibrated, and those that are rounded by it.
CALIBRATED = ("auto-round nvfp4", "w4a16 by gptq", "nested nf4 by statistics")


@pytest.fixture(scope="session")
def recorded(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the tiny pipeline over one step of two prompts."""
    from omni_convert.convert.calibration.recording import record_source
    from omni_convert.convert.source.location import resolve_source

    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.txt").write_text("a cat\na red circle\n")
    recipe = Recipe("nvfp4", calib=folder / "prompts.txt", calib_steps=1, calib_size=(32, 32), device="cpu")
    record_source(resolve_source(tiny_pipeline_folder), recipe, progress=False).statistics.save(folder / "stats")
    return folder / "stats"


# One of each kind; the others take their time at night.
QUICK = ("rotated int8", "w4a8", "nested nf4", *CALIBRATED[:2], "gguf Q3_K_M")


@pytest.fixture(params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES])
def each_recipe(request: pytest.FixtureRequest, recorded: Path) -> Recipe:
    """Each of these conversions, searches left out."""
    recipe = replace(RECIPES[request.param], search=False)
    return replace(recipe, calibration=(recorded,)) if request.param in CALIBRATED else recipe


@pytest.fixture(scope="session")
def larger_pipeline(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a transformer that takes seconds to convert."""
    import torch
    from diffusers import ZImageTransformer2DModel

    folder = tmp_path_factory.mktemp("larger") / "pipeline"
    shutil.copytree(tiny_pipeline_folder, folder)
    shutil.rmtree(folder / "transformer")
    model = ZImageTransformer2DModel(
        dim=768, n_heads=6, n_kv_heads=6, n_layers=4, n_refiner_layers=1, axes_dims=[32, 48, 48], cap_feat_dim=64
    )
    model.to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux transformer as diffusers saves it, in bfloat16."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    folder = tmp_path_factory.mktemp("models") / "flux"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function of a family: its tiny repository, read-only."""
    import tiny_stages

    folder = tmp_path_factory.mktemp("repositories")

    def saved(name: str) -> Path:
        if not (folder / name).exists():
            tiny_stages.save_repository(name, folder / name)
        return folder / name

    return saved


@pytest.fixture(scope="session")
def video_pipeline(tiny_pipeline_folder: Path) -> Any:
    """A pipeline that makes videos from an image and a text, and needs no further package."""
    import diffusers
    import torch
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    return diffusers.LTXImageToVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            patch_size=1,
            patch_size_t=1,
        ),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=300, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
        ).eval(),
        tokenizer=AutoTokenizer.from_pretrained(tiny_pipeline_folder / "tokenizer"),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
    )
