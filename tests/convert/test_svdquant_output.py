"""Conversions to SVDQuant that are interrupted, or go to a URL, give the bytes of one that runs through."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from omni_convert.convert import Recipe, convert_checkpoint

RECIPES = {
    f"{method} {dialect}": Recipe(method=method, dialect=dialect, rank=16, force=True)
    for method, dialect in (
        ("svdquant_int4", "nunchaku-lite"),
        ("svdquant_nvfp4", "nunchaku-lite"),
        ("svdquant_int4", "nunchaku"),
    )
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 transformer whose layers are multiples of 128 wide."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("models") / "transformer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES.keys())
def whole(request: pytest.FixtureRequest, flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe, and the result of a conversion that ran through."""
    output = tmp_path_factory.mktemp("whole") / "out"
    convert_checkpoint(flux, output, request.param)
    return request.param, output


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class StoppedError(Exception):
    """What a user's callback raises."""


@pytest.mark.parametrize("tiles", [1, 12, 40])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    flux: Path, whole: tuple[Recipe, Path], tmp_path: Path, tiles: int
) -> None:
    recipe, expected = whole
    left = tiles

    def interrupt(_: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert_checkpoint(flux, tmp_path / "out", recipe, progress=interrupt)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(flux, tmp_path / "out", replace(recipe, resume=True))
    assert digests(tmp_path / "out") == digests(expected)


def test_a_url_gets_the_same_bytes(
    flux: Path, whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, expected = whole
    monkeypatch.chdir(tmp_path)
    url = f"memory://bucket/{recipe.method}-{recipe.dialect}"
    convert_checkpoint(flux, url, recipe)
    filesystem, path = fsspec.url_to_fs(url)
    found = {
        name.removeprefix(f"{path}/"): hashlib.sha256(filesystem.cat_file(name)).hexdigest()
        for name in filesystem.find(path)
    }
    assert found == digests(expected)
