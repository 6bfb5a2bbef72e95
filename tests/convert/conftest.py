"""Fixtures that tests of the converter share."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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
def tiny_stages() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "tiny_stages.py"
    spec = importlib.util.spec_from_file_location("tiny_stages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def repository(tiny_stages: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function of a family: its tiny repository, read-only."""
    folder = tmp_path_factory.mktemp("repositories")

    def saved(name: str) -> Path:
        if not (folder / name).exists():
            tiny_stages.save_repository(name, folder / name)
        return folder / name

    return saved
