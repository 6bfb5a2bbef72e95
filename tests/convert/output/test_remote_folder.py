"""Outputs behind URLs, of two real file systems of fsspec: one in memory, one on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.convert.output.remote_folder import RemoteFolder
from omni_convert.formats.errors import OutputError, RecipeError

RECIPE = Recipe(max_shard_size="1MB")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, where the journal of an upload is kept."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/out"
        return
    yield "memory://bucket/out"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="module")
def local(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of a conversion into a folder."""
    output = tmp_path_factory.mktemp("local") / "out"
    convert_checkpoint(tiny_pipeline_folder, output, RECIPE)
    paths = [path for path in output.rglob("*") if path.is_file()]
    return {path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def contents(url: str) -> dict[str, bytes]:
    filesystem, path = fsspec.url_to_fs(url)
    return {name.removeprefix(f"{path}/"): filesystem.cat_file(name) for name in filesystem.find(path)}


def digests(url: str) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents(url).items()}


def test_the_bytes_are_those_of_a_folder(
    tiny_pipeline_folder: Path, url: str, local: dict[str, str], elsewhere: Path
) -> None:
    done: list[int] = []
    report = convert_checkpoint(tiny_pipeline_folder, url, RECIPE, progress=done.append)
    assert digests(url) == local
    assert sum(name.endswith(".safetensors") and "transformer" in name for name in local) > 2
    assert sum(done) == report.bytes_before
    assert not list(elsewhere.iterdir())


def test_a_gguf_file_is_sent_as_a_whole(tiny_pipeline_folder: Path, url: str, elsewhere: Path, tmp_path: Path) -> None:
    recipe = Recipe("gguf", gguf_type="Q5_1")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "local" / "out", recipe)
    convert_checkpoint(tiny_pipeline_folder, url, recipe)
    paths = [path for path in (tmp_path / "local" / "out").rglob("*") if path.is_file()]
    assert contents(url) == {
        path.relative_to(tmp_path / "local" / "out").as_posix(): path.read_bytes() for path in paths
    }
    assert sum(path.suffix == ".gguf" for path in paths) == 1
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("url", ["memory://bucket/out"], ids=["memory"])
def test_every_format_arrives_as_in_a_folder(
    tiny_pipeline_folder: Path, url: str, elsewhere: Path, tmp_path: Path, each_recipe: Recipe
) -> None:
    recipe = replace(each_recipe, max_shard_size="300KB")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "local" / "out", recipe)
    convert_checkpoint(tiny_pipeline_folder, url, recipe)
    paths = [path for path in (tmp_path / "local" / "out").rglob("*") if path.is_file()]
    names = {path: path.relative_to(tmp_path / "local" / "out").as_posix() for path in paths}
    assert contents(url) == {name: path.read_bytes() for path, name in names.items()}
    fsspec.filesystem("memory").store.clear()
    assert not list(elsewhere.iterdir())


@pytest.fixture
def failing(url: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the file system fail at the third shard; the names that were sent, in order."""
    filesystem, _ = fsspec.url_to_fs(url)
    sent: list[str] = []
    put_file = type(filesystem).put_file

    def put_until(self: Any, lpath: str, rpath: str, **options: Any) -> None:
        if len(sent) == 2:
            raise ConnectionResetError("the other side hung up")
        put_file(self, lpath, rpath, **options)
        sent.append(rpath)

    monkeypatch.setattr(type(filesystem), "put_file", put_until)
    return sent


def test_an_interrupted_upload_shows_no_model_and_is_resumed(
    tiny_pipeline_folder: Path,
    url: str,
    local: dict[str, str],
    failing: list[str],
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: Path,
) -> None:
    with pytest.raises(OutputError, match=r"the other side hung up.*--resume") as caught:
        convert_checkpoint(tiny_pipeline_folder, url, RECIPE)
    assert "\n" not in str(caught.value)
    before = contents(url)
    assert len(before) == 2
    assert all(name.endswith(".safetensors") for name in before)
    with pytest.raises(OutputError, match="use --resume to continue"):
        convert_checkpoint(tiny_pipeline_folder, url, RECIPE)
    monkeypatch.undo()
    monkeypatch.chdir(elsewhere)
    sent: list[str] = []
    send = RemoteFolder.send
    monkeypatch.setattr(RemoteFolder, "send", lambda self, file, name: (sent.append(name), send(self, file, name)))
    convert_checkpoint(tiny_pipeline_folder, url, Recipe(max_shard_size="1MB", resume=True))
    assert digests(url) == local
    assert not before.keys() & set(sent)
    assert sent[-2:] == ["model_index.json", "omni_convert.json"]
    ends = [position for position, name in enumerate(sent) if name.endswith(("config.json", ".index.json"))]
    assert min(ends) > max(position for position, name in enumerate(sent) if name.endswith(".safetensors"))


def test_a_finished_output_is_left_alone(tiny_pipeline_folder: Path, url: str, local: dict[str, str]) -> None:
    first = convert_checkpoint(tiny_pipeline_folder, url, RECIPE)
    with pytest.raises(OutputError, match="found something there"):
        convert_checkpoint(tiny_pipeline_folder, url, RECIPE)
    again = convert_checkpoint(tiny_pipeline_folder, url, Recipe(max_shard_size="1MB", resume=True))
    assert [layer.name for layer in again.layers] == [layer.name for layer in first.layers]
    assert digests(url) == local


def test_overwriting_leaves_nothing_of_the_earlier_output(
    tiny_pipeline_folder: Path, url: str, local: dict[str, str]
) -> None:
    convert_checkpoint(tiny_pipeline_folder, url, Recipe(method="int8", max_shard_size="300KB"))
    convert_checkpoint(tiny_pipeline_folder, url, Recipe(max_shard_size="1MB", overwrite=True))
    assert digests(url) == local


@pytest.mark.parametrize("url", ["nonsense://bucket/out"], ids=["unknown"])
def test_a_url_of_an_unknown_kind(tiny_pipeline_folder: Path, url: str, elsewhere: Path) -> None:
    result = CliRunner().invoke(main, [str(tiny_pipeline_folder), "-o", url])
    assert result.exit_code == 1
    assert "--output: found a URL that fsspec cannot open" in result.stderr.splitlines()[-1]
    assert not list(elsewhere.iterdir())


def test_a_url_cannot_be_pushed(tiny_pipeline_folder: Path) -> None:
    with pytest.raises(RecipeError, match="expected a folder, whose files can be sent"):
        convert_checkpoint(tiny_pipeline_folder, "memory://out", Recipe(push_to_hub="me/model"))
