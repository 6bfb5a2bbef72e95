"""Wheel, sdist and editable install hold exactly the repository's packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "convert", "formats", "loaders")


def modules() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for layer in ("convert", "formats", "loaders")
        for path in (ROOT / layer).rglob("*.py")
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist, built from a copy that holds no leftovers of other builds."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copyfile(source, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_module_and_nothing_at_top_level(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[0]).namelist()
    packaged = {name.removeprefix("omni_convert/") for name in names if name.endswith(".py")}
    assert packaged == modules()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"omni_convert"}


def test_the_wheel_holds_the_demo(distributions: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    assert {"omni_convert/convert/demo/pipeline/model_index.json", "omni_convert/convert/demo/prompts.txt"} <= names


def test_the_sdist_can_be_built_from(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_plain_install_imports_from_anywhere(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(distributions[0]) as wheel:
        wheel.extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import omni_convert.convert.cli as cli; print(cli.__file__)"
    )
    # -I leaves out the working folder and the environment, so that the repository itself cannot be found by accident.
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert result.stdout.startswith(str(target))
