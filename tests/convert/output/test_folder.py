from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.execution.journal import JOURNAL
from omni_convert.convert.output.folder import check_output, partial_folder
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.formats.errors import OutputError


def earlier_output(folder: Path) -> Path:
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    return folder


def test_output_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with partial_folder(output, overwrite=False) as partial:
        (partial / "file").write_text("x")
        assert not output.exists()
    assert (output / "file").read_text() == "x"
    assert list(output.parent.iterdir()) == [output]


def test_a_failure_leaves_the_work_and_no_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    work = partial_folder(output, overwrite=False)
    (work.__enter__() / "file").write_text("x")
    assert work.__exit__(KeyError, KeyError(), None) is False
    assert not output.exists()
    assert (tmp_path / "out.partial" / "file").exists()


def test_a_failure_leaves_the_old_output(tmp_path: Path) -> None:
    output = earlier_output(tmp_path / "out")
    with pytest.raises(KeyError), partial_folder(output, overwrite=True):
        raise KeyError
    assert (output / MANIFEST).read_text() == "{}"


def test_overwrite_replaces_an_earlier_output(tmp_path: Path) -> None:
    output = earlier_output(tmp_path / "out")
    with partial_folder(output, overwrite=True) as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]


def test_what_is_in_the_way_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="found a file"):
        check_output(file, overwrite=True)
    earlier = earlier_output(tmp_path / "earlier")
    with pytest.raises(OutputError, match="not empty; use --overwrite"):
        check_output(earlier, overwrite=False)
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(OutputError, match="unfinished run"):
        check_output(tmp_path / "new", overwrite=False)


def test_overwrite_deletes_only_what_this_tool_wrote(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter-1.tex").write_text("x")
    with pytest.raises(OutputError, match="not made by omni-convert"):
        check_output(precious, overwrite=True)


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with partial_folder(output, overwrite=False) as partial:
        (partial / "file").write_text("x")
    assert (output / "file").exists()


@pytest.mark.parametrize("suffix", [".previous", ".partial"])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(overwrite=True), Recipe(resume=True)], ids=["", "over", "resume"])
def test_folders_beside_the_output_that_are_not_ours_stay(
    tiny_pipeline_folder: Path, tmp_path: Path, suffix: str, recipe: Recipe
) -> None:
    thesis = tmp_path / f"out{suffix}" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(OutputError, match=f"out{suffix}: found a folder without .* not made by omni-convert"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    assert [path.name for path in tmp_path.rglob("*")] == [thesis.parent.name, thesis.name]


def test_a_kill_between_the_renames_loses_nothing(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert_checkpoint(tiny_pipeline_folder, output)
    output.rename(tmp_path / "out.previous")
    (tmp_path / "out.partial").mkdir()
    convert_checkpoint(tiny_pipeline_folder, output, Recipe(resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_after_the_renames_left_is_tidied_up(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert_checkpoint(tiny_pipeline_folder, output)
    shutil.copytree(output, tmp_path / "out.previous")
    (output / JOURNAL).touch()
    convert_checkpoint(tiny_pipeline_folder, output, Recipe(resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (output / JOURNAL).exists()
