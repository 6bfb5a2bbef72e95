"""The rules of the house that no single module can keep: imports point one way, what is declared is what is there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("formats", "loaders", "convert")  # each may import itself and those before it


def modules() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    upward = {name for name in imported_modules(path) for other in above if name.startswith(f"omni_convert.{other}")}
    assert not upward


def test_declared_packages_are_the_folders_on_disk() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {f"omni_convert.{'.'.join(path.parent.relative_to(ROOT).parts)}" for path in modules()}
    assert set(declared) == on_disk


def test_version_has_one_value() -> None:
    from omni_convert.convert.manifest import VERSION

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


@pytest.mark.parametrize("layer", LAYERS)
def test_every_exported_name_exists(layer: str) -> None:
    package = importlib.import_module(f"omni_convert.{layer}")
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "triton" in info.name and not find_spec("triton"):
            continue  # these are imported only where it is installed
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{info.name}.{name}"


@pytest.mark.parametrize(("arguments", "status"), [(["convert", "--help"], 0), (["-m", "nvpf4"], 1)])
def test_help_and_typing_errors_do_not_wait_for_torch(arguments: list[str], status: int) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from omni_convert.convert.cli import main; "
        f"result = CliRunner().invoke(main, {arguments}); "
        f"assert result.exit_code == {status}, result.output; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
