"""Fixtures that tests of the converter share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
