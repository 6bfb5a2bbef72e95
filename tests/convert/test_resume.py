"""Interrupted conversions: what a kill, a full disk or a damaged byte leaves; resumed, they give the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.convert.execution.journal import JOURNAL, Journal, Record
from omni_convert.convert.execution.tile import tiles_of
from omni_convert.convert.plan.plan import plan_conversion
from omni_convert.convert.report import conversion_report
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, OutputError, RecipeError
from omni_convert.formats.schemes import nvfp4

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
METHOD = "mxfp4"


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def records(output: Path) -> int:
    """How many finished ranges the journal of an unfinished output has."""
    journal = output.with_name(output.name + ".partial") / JOURNAL
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def start(source: Path, output: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "omni_convert.convert.cli",
        str(source),
        "-m",
        METHOD,
        "-o",
        str(output),
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def convert_until(source: Path, output: Path, finished: int, *options: str) -> bool:
    """Converts in a process that is killed once it has noted so many ranges; whether it was."""
    process = start(source, output, *options)
    while process.poll() is None and records(output) < finished:
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(larger_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of an uninterrupted conversion."""
    output = tmp_path_factory.mktemp("whole") / "out"
    convert_checkpoint(larger_pipeline, output, Recipe(method=METHOD, workers=1))
    return digests(output)


@pytest.fixture(scope="module")
def tile_count(larger_pipeline: Path) -> int:
    plan = plan_conversion(resolve_source(larger_pipeline), Recipe(method=METHOD))
    return sum(len(tiles_of(step)) for component in plan.components for step in component.steps)


def kill_and_resume(source: Path, output: Path, tile_count: int, seed: int) -> None:
    """Kills one or two runs at random points, then lets one finish."""
    chance = random.Random(seed)
    for _ in range(5):
        if convert_until(source, output, chance.randrange(tile_count), "--workers", str(chance.randint(1, 3))):
            break
        shutil.rmtree(output)  # on a busy machine it may be done before it is killed
    else:
        pytest.fail("every run was done before it could be killed")
    assert not output.exists()
    if chance.random() < 0.5:
        convert_until(source, output, chance.randrange(tile_count), "--resume", "--workers", str(chance.randint(1, 3)))
    result = run(source, "-m", METHOD, "-o", output, "--resume", "--workers", chance.randint(1, 3))
    assert result.exit_code == 0, result.output
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_conversion_goes_on_to_the_same_bytes(
    larger_pipeline: Path, tmp_path: Path, whole: dict[str, str], tile_count: int, seed: int
) -> None:
    kill_and_resume(larger_pipeline, tmp_path / "out", tile_count, seed)
    assert digests(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 23))
def test_a_kill_at_any_point(
    larger_pipeline: Path, tmp_path: Path, whole: dict[str, str], tile_count: int, seed: int
) -> None:
    kill_and_resume(larger_pipeline, tmp_path / "out", tile_count, seed)
    assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    larger_pipeline: Path, tmp_path: Path, whole: dict[str, str], workers: int
) -> None:
    convert_checkpoint(larger_pipeline, tmp_path / "out", Recipe(method=METHOD, workers=workers))
    assert digests(tmp_path / "out") == whole


@pytest.fixture
def interrupted(tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a conversion to FP8 whose disk failed at the 40th write; `source` beside it is the model."""
    shutil.copytree(tiny_pipeline_folder, tmp_path / "source")
    writes = iter(range(40))
    pwrite = os.pwrite

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        if next(writes, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OutputError, match="Input/output error") as caught:
        convert_checkpoint(tmp_path / "source", tmp_path / "out", Recipe(workers=2))
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert records(tmp_path / "out") > 10
    return tmp_path / "out"


def resume(output: Path, recipe: Recipe | None = None) -> dict[str, str]:
    convert_checkpoint(output.with_name("source"), output, recipe or Recipe(resume=True))
    return digests(output)


@pytest.fixture(scope="module")
def plain(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of an uninterrupted conversion of the tiny pipeline to FP8."""
    output = tmp_path_factory.mktemp("plain") / "out"
    shutil.copytree(tiny_pipeline_folder, output.with_name("source"))
    convert_checkpoint(output.with_name("source"), output)
    return digests(output)


def test_a_failed_write_can_be_resumed(interrupted: Path, plain: dict[str, str]) -> None:
    assert resume(interrupted) == plain


def unfinished_weights(output: Path) -> Path:
    return output.with_name(output.name + ".partial") / WEIGHTS


def test_unfinished_weights_cannot_be_read(interrupted: Path) -> None:
    from omni_convert.formats.containers.safetensors_file import SafetensorsFile

    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        SafetensorsFile(unfinished_weights(interrupted))


def test_finished_ranges_are_not_made_again(interrupted: Path, plain: dict[str, str]) -> None:
    """The source of a finished range is ruined unnoticed, so that only its first conversion can be right."""
    source = interrupted.with_name("source") / WEIGHTS
    before = source.stat()
    journal = interrupted.with_name("out.partial") / JOURNAL
    finished = [json.loads(line)["range"] for line in journal.read_text().splitlines()[1:]]
    weight = next(name for name in finished if name.endswith("weight:0") and "attention.to_" in name)
    with source.open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        tensor = weight.removeprefix("transformer/").removesuffix(":0")
        begin, _ = json.loads(file.read(header))[tensor]["data_offsets"]
        file.seek(8 + header + begin)
        file.write(bytes(64))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resume(interrupted) == plain


def test_damaged_ranges_are_made_again(interrupted: Path, plain: dict[str, str]) -> None:
    weights = unfinished_weights(interrupted)
    content = bytearray(weights.read_bytes())
    for position in range(len(content) // 2, len(content), 1000):
        content[position] ^= 1
    weights.write_bytes(content)
    assert resume(interrupted) == plain


def test_a_truncated_file_is_made_again(interrupted: Path, plain: dict[str, str]) -> None:
    os.truncate(unfinished_weights(interrupted), 5000)
    assert resume(interrupted) == plain


def test_a_journal_that_a_kill_cut_short_is_read_up_to_there(interrupted: Path, plain: dict[str, str]) -> None:
    journal = interrupted.with_name("out.partial") / JOURNAL
    os.truncate(journal, journal.stat().st_size - 10)
    assert resume(interrupted) == plain


def test_an_empty_journal_starts_afresh(interrupted: Path, plain: dict[str, str]) -> None:
    os.truncate(interrupted.with_name("out.partial") / JOURNAL, 0)
    assert resume(interrupted) == plain


@pytest.mark.parametrize("spoiled", [b"\0" * 80 + b"\n", b'{"range": 1}\n', b"[]\n", b"\xff\n"])
def test_a_journal_is_good_up_to_a_damaged_line(interrupted: Path, plain: dict[str, str], spoiled: bytes) -> None:
    journal = interrupted.with_name("out.partial") / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:10], spoiled, *lines[11:]]))
    assert resume(interrupted) == plain


def test_a_disk_that_fills_up_within_a_line_leaves_a_journal_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write after the job takes half a line, the next fails; then there is room again."""
    path = tmp_path / JOURNAL
    write, calls = os.write, iter([True, True, False])

    def failing(descriptor: int, data: bytes) -> int:
        if not next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2])

    with Journal(path, {"source": {}}) as journal:
        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(OutputError, match="No space left"):
            journal.add("a", Record(1))
        monkeypatch.undo()
        journal.add("b", Record(2, fit=3))
    with Journal(path, {"source": {}}) as journal:
        assert journal.get("a") is None
        assert journal.get("b") == Record(2, fit=3)


def test_a_sync_that_fails_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal(tmp_path / JOURNAL, {"source": {}}) as journal, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        patch.setattr("omni_convert.convert.execution.journal.SYNC_SECONDS", -1.0)
        with pytest.raises(OutputError, match="Input/output error"):
            journal.add("a", Record(1))


@pytest.mark.parametrize("finished", range(1, 12, 2))
def test_ranges_of_one_group_never_mix_two_decisions(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    """Another machine may decide otherwise on a scale that a fused group shares."""
    recipe = Recipe(method="nvfp4", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(nvfp4, "_search_global_factor", lambda *_: 1.75)
        patch.setattr(Journal, "add", failing_after(finished, Journal.add))
        with pytest.raises(OutputError, match="interrupted here"):
            convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    monkeypatch.setattr(nvfp4, "_search_global_factor", lambda *_: 1.0)
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", replace(recipe, resume=True))
    checkpoint = Checkpoint.open(tmp_path / "out" / "transformer")
    scales = {name: float(checkpoint.read(name)) for name in checkpoint if name.endswith(".weight_scale_2")}
    for name, scale in scales.items():
        if ".to_q." in name:
            assert {scales[name.replace(".to_q.", f".{member}.")] for member in ("to_k", "to_v")} == {scale}


def failing_after(count: int, add: Callable[[Journal, str, Record], None]) -> Callable[[Journal, str, Record], None]:
    calls = iter(range(count))

    def wrapped(journal: Journal, name: str, record: Record) -> None:
        if next(calls, None) is None:
            raise OutputError("interrupted here")
        add(journal, name, record)

    return wrapped


def test_every_format_goes_on_to_the_same_bytes(
    tiny_pipeline_folder: Path, tmp_path: Path, each_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "whole" / "out", each_recipe)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", failing_after(25, Journal.add))
        with pytest.raises(OutputError, match="interrupted here"):
            convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", each_recipe)
    assert records(tmp_path / "out") == 25
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", replace(each_recipe, resume=True, workers=2))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole" / "out")


def test_a_journal_of_another_kind_is_refused(interrupted: Path) -> None:
    journal = interrupted.with_name("out.partial") / JOURNAL
    journal.write_bytes(journal.read_bytes().replace(b'"error": [', b'"error": [[], '))
    with pytest.raises(OutputError, match="found another kind of journal; use --overwrite"):
        resume(interrupted)


def test_another_recipe_is_refused(interrupted: Path) -> None:
    with pytest.raises(RecipeError, match=r"conversion \(method was fp8, is int8\); .*--overwrite") as caught:
        resume(interrupted, Recipe(method="int8", resume=True))
    assert "\n" not in str(caught.value)


def test_how_the_work_is_done_may_change(interrupted: Path, plain: dict[str, str]) -> None:
    recipe = Recipe(resume=True, workers=3, device="cpu", force=True)
    assert resume(interrupted, recipe) == plain


@pytest.mark.parametrize("file", [WEIGHTS, "vae/diffusion_pytorch_model.safetensors"])
def test_a_source_that_has_changed_is_refused(interrupted: Path, file: str) -> None:
    os.utime(interrupted.with_name("source") / file)
    with pytest.raises(CheckpointError, match=f"{file}: found another file") as caught:
        resume(interrupted)
    assert "\n" not in str(caught.value)


def test_a_config_that_has_changed_is_refused(interrupted: Path) -> None:
    path = interrupted.with_name("source") / "transformer" / "config.json"
    path.write_text(path.read_text().replace("{", '{"added": 1,', 1))
    with pytest.raises(CheckpointError, match=r"transformer/config\.json: found another file"):
        resume(interrupted)


def test_overwrite_starts_afresh(interrupted: Path, plain: dict[str, str]) -> None:
    (interrupted.with_name("out.partial") / "stray").write_text("x")
    assert resume(interrupted, Recipe(overwrite=True)) == plain


def test_without_an_option_the_work_is_left_alone(interrupted: Path) -> None:
    before = digests(interrupted.with_name("out.partial"))
    with pytest.raises(OutputError, match="use --resume to go on, or --overwrite to start afresh"):
        resume(interrupted, Recipe())
    assert digests(interrupted.with_name("out.partial")) == before


def test_with_nothing_there_resume_starts_afresh(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "a" / "out", Recipe(resume=True))
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "b" / "out")
    assert digests(tmp_path / "a" / "out") == digests(tmp_path / "b" / "out")


def test_a_finished_output_has_nothing_to_resume(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    first = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(resume=True))
    assert "time to convert   none: it was finished before" in list(conversion_report(again, as_json=False))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    assert [layer.name for layer in again.layers] == [layer.name for layer in first.layers]
    assert again.worst.relative_error == pytest.approx(first.worst.relative_error, rel=1e-3)
    with pytest.raises(OutputError, match="found the finished output of another conversion; use --overwrite"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="int8", resume=True))


def test_a_second_converter_on_the_same_output_is_refused(larger_pipeline: Path, tmp_path: Path) -> None:
    process = start(larger_pipeline, tmp_path / "out")
    while not records(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    results = [
        run(larger_pipeline, "-m", METHOD, "-o", tmp_path / "out", *options)
        for options in ([], ["--resume"], ["--overwrite"], ["--overwrite", "--resume"])
    ]
    process.send_signal(signal.SIGCONT)
    for result in results:
        assert result.exit_code == 1
        assert "found another omni-convert at work here" in result.stderr
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "out" / "omni_convert.json").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room", [64 << 10, 1 << 20], ids=["for nothing", "for some"])
def test_a_full_disk_can_be_resumed_when_there_is_room(
    tiny_pipeline_folder: Path, tmp_path: Path, disk: Path, room: int
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "whole" / "out")
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (16 << 20) - room)
    result = run(tiny_pipeline_folder, "-o", disk / "out")
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert not (disk / "out").exists()
    ballast.unlink()
    result = run(tiny_pipeline_folder, "-o", disk / "out", "--resume")
    assert result.exit_code == 0, result.output
    assert digests(disk / "out") == digests(tmp_path / "whole" / "out")
