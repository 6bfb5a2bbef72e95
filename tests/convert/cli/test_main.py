"""The command line, through click's runner: what a user types, and what comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from omni_convert.convert.cli.main import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    """The one line that a failed run prints."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Note: ")]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("Error: ")
    return lines[0]


def test_convert_is_the_default_command(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_pipeline_folder, "-m", "fp8", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "layers quantized" in result.stdout
    assert (tmp_path / "out" / "model_index.json").exists()


def test_json_output_is_one_document(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    result = run(tiny_pipeline_folder, "-m", "int8", "-o", tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert report["bytes_after"] < report["bytes_before"]
    assert all(0 < layer["relative_error"] < 0.1 for layer in report["layers"])
    assert report["warnings"] == []


def test_quiet_prints_nothing(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    assert run(tiny_pipeline_folder, "-o", tmp_path / "out", "--quiet").output == ""


def test_dry_run_lists_every_layer_and_writes_nothing(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(tiny_pipeline_folder, "-o", output, "--dry-run", "--ignored-layers", '["w2"]')
    assert result.exit_code == 0, result.output
    assert "transformer.layers.0.attention.to_q" in result.stdout
    assert "ignored by 'w2'" in result.stdout
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_default_output_is_named_after_model_and_method(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny_pipeline_folder, "--method", "int8").exit_code == 0
    assert (tmp_path / f"{tiny_pipeline_folder.name}-int8" / "omni_convert.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "fp9"], "--method: found 'fp9', expected one of fp8, .*; did you mean 'fp8'"),
        (["--ignored-layers", "img_mpl"], "'img_mpl' matches no layer"),
        (["--ignored-layers", "[1]"], "expected a JSON list of strings"),
        (["--ignored-layers", "[oops"], "expected a JSON list of strings"),
        (["--component", "text_encoder"], "found 'text_encoder', expected NAME=METHOD"),
        (["--activation-scheme", "static"], "found no statistics; add --calib"),
        (["--calib", "/nonexistent/prompts.txt"], "/nonexistent/prompts.txt: file missing"),
        (["--max-shard-size", "lots"], "lots"),
        (["--device", "toaster"], "found 'toaster'"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_status_1(
    tiny_pipeline_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(tiny_pipeline_folder, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1, result.output
    assert re.search(message, error_line(result))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "nothing is there" in error_line(result)


@pytest.mark.parametrize(("typed", "meant"), [("convrt", "convert"), ("verfy", "verify")])
def test_a_mistyped_command_is_no_model(typed: str, meant: str) -> None:
    result = run(typed, "model")
    assert result.exit_code == 2
    assert f"No such command or model '{typed}'. Did you mean '{meant}'?" in result.output


def test_only_the_prompts_of_the_example_need_not_be_there(tmp_path: Path) -> None:
    result = run("--calib", tmp_path / "other.txt", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "other.txt: file missing" in error_line(result)


def test_an_empty_prompts_file(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# only a comment\n\n")
    result = run(tiny_pipeline_folder, "--calib", tmp_path / "prompts.txt", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "prompts.txt" in error_line(result)
    assert not (tmp_path / "out").exists()


def test_wrong_usage_is_status_2() -> None:
    assert run("convert", "--no-such-option").exit_code == 2
    assert run("compare").exit_code == 2


JSON_COMMANDS = [
    name for name, command in main.commands.items() if any(each.name == "as_json" for each in command.params)
]


@pytest.mark.parametrize("command", JSON_COMMANDS)
def test_a_json_command_that_fails_prints_one_line_on_standard_error_alone(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path / "nothing", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nothing is there" in error_line(result)


@pytest.mark.parametrize("command", [name for name in JSON_COMMANDS if name != "verify"])  # which is for such files
def test_a_damaged_model_leaves_no_half_of_a_document(command: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    file = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    options = () if command == "inspect" else ("-o", tmp_path / "out")
    result = run(command, tmp_path / "model", "--json", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(file) in error_line(result)


def test_every_command_has_a_summary_that_fits_its_line() -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["--help"])
    assert all(name in result.stdout for name in main.commands)
    assert "..." not in result.stdout.partition("Commands:")[2]


def test_calibrate_then_convert_static(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    statistics = tmp_path / "stats.safetensors"
    options = ["--calib-steps", "2", "--calib-size", "32x32"]
    result = run("calibrate", tiny_pipeline_folder, "--calib", tmp_path / "prompts.txt", "-o", statistics, *options)
    assert result.exit_code == 0, result.output
    again = run("calibrate", tiny_pipeline_folder, "--calib", tmp_path / "prompts.txt", "-o", statistics, *options)
    assert "file exists" in error_line(again)
    result = run(tiny_pipeline_folder, "--calibration", statistics, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"


def test_calibrate_goes_on_after_an_interruption(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na star\na ring\na blue square\n")
    options = ["--calib", prompts, "--calib-steps", "2", "--calib-size", "32x32"]
    paths = [tmp_path / f"{name}.safetensors" for name in ("whole", "resumed", "first")]
    whole = run("calibrate", tiny_pipeline_folder, "-o", paths[0], *options)
    assert "over the last quarter of the prompts, the largest input of " in whole.stderr
    assert run("calibrate", tiny_pipeline_folder, "-o", paths[2], "--calib-prompts", 2, *options).exit_code == 0
    unfinished = tmp_path / "resumed.safetensors.unfinished"
    paths[2].rename(unfinished)  # what an interruption after two prompts leaves
    again = run("calibrate", tiny_pipeline_folder, "-o", paths[1], *options)
    assert "use --resume to go on, or --overwrite to start afresh" in error_line(again)
    with_moments = run("calibrate", "--resume", "--moments", tmp_path / "moments", "-o", paths[1], *options)
    assert "--resume: found with --moments" in error_line(with_moments)
    assert run("calibrate", tiny_pipeline_folder, "-o", paths[1], "--resume", *options).exit_code == 0
    assert paths[1].read_bytes() == paths[0].read_bytes()
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.tensor", "no file extension of an image"),
        ("out.mpeg", "no file extension of an image"),
        ("none/out.png", "no folder"),
    ],
)
def test_generate_looks_at_its_output_before_it_runs(
    tiny_pipeline_folder: Path, tmp_path: Path, output: str, message: str
) -> None:
    result = CliRunner().invoke(
        main, ["generate", str(tiny_pipeline_folder), "--prompt", "a star", "-o", str(tmp_path / output)]
    )
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_generate_writes_an_image_and_names_the_kernels(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    assert run(tiny_pipeline_folder, "-m", "int8", "-o", tmp_path / "out").exit_code == 0
    image = tmp_path / "image.png"
    result = run(
        "generate",
        tmp_path / "out",
        "--prompt",
        "a star",
        "-o",
        image,
        *["--steps", "2", "--width", "32", "--height", "32"],
    )
    assert result.exit_code == 0, result.output
    assert image.stat().st_size > 0
    assert "int8" in result.stdout
    assert "layers" in result.stdout


def test_compare_reports_the_keys_of_serving_engines(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    assert run(tiny_pipeline_folder, "-m", "int8", "-o", tmp_path / "out").exit_code == 0
    report_file = tmp_path / "report.json"
    result = run(
        "compare",
        *("--reference-model", tiny_pipeline_folder, "--candidate-model", tmp_path / "out"),
        *("--prompt", "a star", "--prompt", "a ring", "--output-json", report_file),
        *("--save-output-dir", tmp_path / "images", "--steps", "2", "--width", "32", "--height", "32"),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert {"output_json", "image0_psnr_db", "image0_mae"} < summary.keys()
    assert len(summary["per_image_mae"]) == 2
    report: dict[str, Any] = json.loads(report_file.read_text())
    assert {
        "model",
        "prompt",
        "negative_prompt",
        "seed",
        "warmup_runs",
        "measure_runs",
        "variant_configs",
        "sampling_kwargs",
        "metric_guidance",
        "reference_generation",
        "candidate_generation",
        "output_metrics",
        "saved_outputs",
    } <= report.keys()
    assert report["output_metrics"]["num_images"] == 2
    assert (tmp_path / "images" / "comparison.png").exists()


def hear_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so do their children; a user's terminal is no such job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_slow_conversion(source: Path, output: Path) -> subprocess.Popen[bytes]:
    """A conversion in a process of its own, caught once it is writing."""
    command = [
        sys.executable,
        "-m",
        "omni_convert.convert.cli",
        str(source),
        "-m",
        "mxfp4_dualscale",
        "-o",
        str(output),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_interrupts)
    partial = output.with_name(output.name + ".partial")
    while not list(partial.glob("transformer/*.safetensors")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    return process


def test_an_interruption_leaves_the_work_but_no_output(larger_pipeline: Path, tmp_path: Path) -> None:
    process = start_slow_conversion(larger_pipeline, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    told, last = errors.decode().splitlines()[-2:]
    assert last == "Error: interrupted"
    assert told == f"{tmp_path / 'out.partial'} holds the finished work; --resume continues from there"
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()


def test_a_kill_leaves_the_work_and_overwrite_clears_it(
    larger_pipeline: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    process = start_slow_conversion(larger_pipeline, tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert "unfinished run" in error_line(run(tiny_pipeline_folder, "-o", tmp_path / "out"))
    assert run(tiny_pipeline_folder, "-o", tmp_path / "out", "--overwrite").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_no_output(tiny_pipeline_folder: Path, small_disk: Path) -> None:
    result = run(tiny_pipeline_folder, "-o", small_disk / "out")
    assert result.exit_code == 1, result.output
    assert "space" in error_line(result)
    assert not (small_disk / "out").exists()
    assert (small_disk / "out.partial").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be created" in error_line(run(tiny_pipeline_folder, "-o", locked / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("component", ["vae", "text_encoder", "transformer"])
def test_other_libraries_add_nothing_to_what_verify_says(component: str, tiny_pipeline_folder: Path) -> None:
    command = [sys.executable, "-m", "omni_convert.convert.cli", "verify", str(tiny_pipeline_folder / component)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_text_encoder_is_verified_without_diffusers(tiny_pipeline_folder: Path) -> None:
    script = (
        "import sys; from omni_convert.convert.cli.main import main; "
        f"main(['verify', {str(tiny_pipeline_folder / 'text_encoder')!r}], standalone_mode=False); "
        "sys.exit('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
