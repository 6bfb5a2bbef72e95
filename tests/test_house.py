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
#: Rooms in their order: each may import itself and those before it. A module of a root that rooms build on stands here
#: by its own name; the others of that root come where the root stands.
ROOMS = (
    "formats.errors",
    "formats.rows",
    "formats.arithmetic",
    "formats.arithmetic.ggml",
    "formats.containers",
    "formats.statistics",
    "formats.options",
    "formats.format",
    "formats.schemes",
    "formats",
    "formats.families",
    "formats.dialects",
    "formats.views",
    "formats.checks",
    "loaders.memory",
    "loaders.kernels",
    "loaders.layers",
    "loaders.request",
    "loaders.loading",
    "loaders.attention",
    "loaders",
    "convert.budget",
    "convert.recipe",
    "convert.device",
    "convert.workers",
    "convert.cluster",
    "convert.progress_bar",
    "convert.terminal",
    "convert.source",
    "convert.calibration",
    "convert.plan",
    "convert.precision",
    "convert.execution",
    "convert.output",
    "convert.report",
    "convert.inspection",
    "convert.comparison",
    "convert.page",
    "convert",
    "convert.cli",
)
LAYERS = ("formats", "loaders", "convert")
#: More modules than this, and nobody finds the right one. Lists of like things may be longer: one file each, one line
#: each in the room's table.
MOST_MODULES = 20
LISTS = ("formats.families", "formats.dialects")


def modules() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def room_of(module: str) -> str:
    """The longest entry of `ROOMS` that a module, or a name in one, lies in."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


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
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    own = ROOMS.index(room_of(module))
    ours = {name.removeprefix("omni_convert.") for name in imported_modules(path) if name.startswith("omni_convert.")}
    upward = {name for name in ours if ROOMS.index(room_of(name)) > own}
    if path.name == "__init__.py" and len(path.relative_to(ROOT).parts) == 2:
        upward = {name for name in upward if not name.startswith(f"{path.parent.name}.")}  # exports its rooms' names
    assert not upward


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules()}), ids=lambda path: str(path.name))
def test_a_room_can_be_taken_in_at_a_glance(folder: Path) -> None:
    if ".".join(folder.relative_to(ROOT).parts) not in LISTS:
        found = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(found) <= MOST_MODULES


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules()}), ids=lambda path: str(path.name))
def test_every_room_has_a_page(folder: Path) -> None:
    assert (folder / "README.md").is_file(), "write a page: what lives here, what it may import, how to add one more"


def test_declared_packages_are_the_folders_on_disk() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {f"omni_convert.{'.'.join(path.parent.relative_to(ROOT).parts)}" for path in modules()}
    assert set(declared) == on_disk


def test_version_has_one_value() -> None:
    from omni_convert.convert.output.manifest import VERSION

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
        "import sys; from click.testing import CliRunner; from omni_convert.convert.cli.main import main; "
        f"result = CliRunner().invoke(main, {arguments}); "
        f"assert result.exit_code == {status}, result.output; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
