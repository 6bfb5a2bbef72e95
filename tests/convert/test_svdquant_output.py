"""Conversions to SVDQuant that are interrupted, or go to a URL, give the bytes of one that runs through."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from omni_convert.convert import Recipe, convert_checkpoint

RECIPES = {
    f"{method} {dialect}": Recipe(method=method, dialect=dialect, rank=16, force=True)
    for method, dialect in (
        ("svdquant_int4", "nunchaku-lite"),
        ("svdquant_nvfp4", "nunchaku-lite"),
        ("svdquant_int4", "nunchaku"),
        ("svdquant_nvfp4", "nunchaku"),
        ("svdquant_nvfp4", "vllm-omni-svdquant"),
    )
}


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES.keys())
def whole(
    request: pytest.FixtureRequest, wide_flux: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A recipe, and the result of a conversion that ran through."""
    output = tmp_path_factory.mktemp("whole") / "out"
    convert_checkpoint(wide_flux, output, request.param)
    return request.param, output


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class StoppedError(Exception):
    """What a user's callback raises."""


@pytest.mark.parametrize("tiles", [1, 12, 40])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    wide_flux: Path, whole: tuple[Recipe, Path], tmp_path: Path, tiles: int
) -> None:
    recipe, expected = whole
    left = tiles

    def interrupt(_: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert_checkpoint(wide_flux, tmp_path / "out", recipe, progress=interrupt)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(wide_flux, tmp_path / "out", replace(recipe, resume=True))
    assert digests(tmp_path / "out") == digests(expected)


def test_a_url_gets_the_same_bytes(
    wide_flux: Path, whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, expected = whole
    monkeypatch.chdir(tmp_path)
    url = f"memory://bucket/{recipe.method}-{recipe.dialect}"
    convert_checkpoint(wide_flux, url, recipe)
    filesystem, path = fsspec.url_to_fs(url)
    found = {
        name.removeprefix(f"{path}/"): hashlib.sha256(filesystem.cat_file(name)).hexdigest()
        for name in filesystem.find(path)
    }
    assert found == digests(expected)
