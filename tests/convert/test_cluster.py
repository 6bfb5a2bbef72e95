"""How a Ray cluster is reached, and what is said when it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.convert.cluster import _address, check_versions, versions
from omni_convert.formats.errors import ClusterError, RecipeError


@pytest.mark.parametrize(
    ("engine", "address"),
    [
        ("ray", "auto"),
        ("ray://auto", "auto"),
        ("ray://head", "head:6379"),
        ("ray://head:6380", "head:6380"),
        ("head:6380", "head:6380"),
        ("ray://head:10001", "ray://head:10001"),
    ],
)
def test_addresses(engine: str, address: str) -> None:
    assert Recipe(engine=engine).is_distributed
    assert _address(engine) == address


@pytest.mark.parametrize("engine", ["dask", "ray:", "ray://", "head", "ray://head:port", "local://"])
def test_an_engine_that_there_is_not(engine: str) -> None:
    with pytest.raises(RecipeError, match="expected local, ray, ray://HOST:PORT or HOST:PORT"):
        Recipe(engine=engine)


@pytest.mark.parametrize("engine", ["127.0.0.1:9", "ray://127.0.0.1:10001"])
def test_a_cluster_that_is_not_there(tiny_pipeline_folder: Path, tmp_path: Path, engine: str) -> None:
    result = CliRunner().invoke(main, [str(tiny_pipeline_folder), "-o", str(tmp_path / "out"), "--engine", engine])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: --engine {engine}: found no Ray cluster at")
    assert not list(tmp_path.iterdir())


def test_without_the_extra(tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"install the extra: pip install 'omni-convert\[ray\]'") as caught:
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(engine="ray"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_machines_with_another_version_take_no_part() -> None:
    check_versions(versions(), "node")
    with pytest.raises(ClusterError, match=r"node: found torch .*, expected 1.0, which began the work"):
        check_versions({**versions(), "torch": "1.0"}, "node")
