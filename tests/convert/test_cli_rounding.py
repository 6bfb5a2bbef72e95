"""From prompts to compensated weights on the command line: `calibrate`, then `convert` with what it recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from omni_convert.convert.cli.main import main

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def convert(model: Path, output: Path, *arguments: str | Path) -> dict[str, torch.Tensor]:
    result = run(model, "-o", output, "--quiet", *arguments)
    assert result.exit_code == 0, result.output
    return load_file(output / WEIGHTS)


def manifest_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "omni_convert.json").read_text()))


@pytest.fixture(scope="module")
def recorded(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stats.safetensors and moments.safetensors of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    files = ("-o", folder / "stats.safetensors", "--moments", folder / "moments.safetensors")
    options = ("--calib", folder / "prompts.txt", "--calib-steps", "2", "--calib-size", "32x32", *files)
    result = run("calibrate", tiny_pipeline_folder, *options)
    assert result.exit_code == 0, result.output
    assert "moments.safetensors: " in result.stdout
    again = run("calibrate", tiny_pipeline_folder, *options[:-4], "-o", folder / "others", *files[2:])
    assert "moments.safetensors: file exists; use --overwrite, or name another --moments" in again.stderr
    return folder


@pytest.mark.parametrize("method", ["fp8", "int8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4"])
def test_moments_change_the_elements_and_nothing_else(
    tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path, method: str
) -> None:
    plain = convert(tiny_pipeline_folder, tmp_path / "plain", "-m", method)
    moments = ("--moments", recorded / "moments.safetensors")
    rounded = convert(tiny_pipeline_folder, tmp_path / "gptq", "-m", method, *moments, "--rounding", "gptq")
    assert manifest_of(tmp_path / "gptq")["recipe"]["rounding"] == "gptq"
    assert {name: (t.dtype, t.shape) for name, t in rounded.items()} == {
        name: (t.dtype, t.shape) for name, t in plain.items()
    }
    stem = "layers.0.feed_forward.w2"
    changed = plain[f"{stem}.weight"].view(torch.uint8) != rounded[f"{stem}.weight"].view(torch.uint8)
    assert 0.01 < changed.float().mean() < 0.8
    assert (tmp_path / "gptq/transformer/config.json").read_text() == (
        tmp_path / "plain/transformer/config.json"
    ).read_text()


def test_moments_mean_auto_and_work_beside_statistics(
    tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path
) -> None:
    files = ("--calibration", recorded / "stats.safetensors", "--moments", recorded / "moments.safetensors")
    tensors = convert(tiny_pipeline_folder, tmp_path / "one", "-m", "mxfp4_dualscale", *files, "--workers", "1")
    assert any(bool((tensor != 1).any()) for name, tensor in tensors.items() if name.endswith("mul_scale"))
    manifest = manifest_of(tmp_path / "one")
    assert manifest["recipe"]["rounding"] == "auto"
    assert len(manifest["moments"]) == 64
    again = convert(tiny_pipeline_folder, tmp_path / "two", "-m", "mxfp4_dualscale", *files, "--workers", "2")
    assert all(
        torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8))
        for name, tensor in tensors.items()
        if tensor.dim()
    )
    assert manifest == manifest_of(tmp_path / "two")


def test_rounding_to_nearest_ignores_moments_and_says_so(
    tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path
) -> None:
    moments = ("--moments", recorded / "moments.safetensors", "--rounding", "nearest")
    result = run(tiny_pipeline_folder, "-m", "int8", "-o", tmp_path / "moments", *moments)
    assert "Note: --rounding nearest: the moments were not used" in result.stderr
    convert(tiny_pipeline_folder, tmp_path / "plain", "-m", "int8")
    assert manifest_of(tmp_path / "moments") == manifest_of(tmp_path / "plain")


def test_several_moments_files_are_merged(tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a green star\n")
    more = tmp_path / "more.safetensors"
    options = ("--calib", tmp_path / "prompts.txt", "--calib-steps", "1", "--calib-size", "32x32")
    result = run("calibrate", tiny_pipeline_folder, *options, "-o", tmp_path / "stats", "--moments", more)
    assert result.exit_code == 0, result.output
    first = recorded / "moments.safetensors"
    forward = convert(tiny_pipeline_folder, tmp_path / "a", "-m", "int8", "--moments", first, "--moments", more)
    backward = convert(tiny_pipeline_folder, tmp_path / "b", "-m", "int8", "--moments", more, "--moments", first)
    assert all(torch.equal(tensor, backward[name]) for name, tensor in forward.items())
    assert manifest_of(tmp_path / "a") == manifest_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounding", "gptq"], "--rounding gptq: found no statistics; add --calib PROMPTS"),
        (["--moments", "/nonexistent/moments"], "/nonexistent/moments"),
        (["--component", "text_encoder=fp8", "--moments", "{moments}"], "the moments do not cover this layer"),
    ],
)
def test_what_is_missing_is_one_line(
    tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    arguments = [argument.format(moments=recorded / "moments.safetensors") for argument in arguments]
    result = run(tiny_pipeline_folder, "-o", tmp_path / "out", "--quiet", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_moments_of_another_model_are_refused(tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline_folder, other)
    tensors = {name: tensor * 1.25 for name, tensor in load_file(other / WEIGHTS).items()}
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    result = run(other, "-o", tmp_path / "out", "--moments", recorded / "moments.safetensors", "--quiet")
    assert result.exit_code == 1
    assert "belong to another model" in result.stderr


def test_statistics_alone_change_the_elements_of_few_bits(
    tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path
) -> None:
    options = ("-m", "w4a16", "--calibration", recorded / "stats.safetensors")
    nearest = convert(tiny_pipeline_folder, tmp_path / "nearest", *options, "--rounding", "nearest")
    rounded = convert(tiny_pipeline_folder, tmp_path / "gptq", *options, "--rounding", "gptq")
    changed = {name for name, tensor in rounded.items() if not torch.equal(tensor, nearest[name])}
    assert changed == {name for name in rounded if name.endswith(".qweight")}
    result = run(tiny_pipeline_folder, "-o", tmp_path / "auto", *options)
    assert result.exit_code == 0
    assert "statistics were not used" not in result.output
    assert "rounding          GPTQ where it makes errors of outputs smaller" in result.stdout
    outputs = [tmp_path / name for name in ("nearest", "gptq", "auto")]
    assert [manifest_of(output)["recipe"].get("rounding") for output in outputs] == ["nearest", "gptq", None]
    assert ["GPTQ" in (output / "README.md").read_text() for output in outputs] == [False, True, True]


def test_statistics_change_eight_bits_only_where_that_is_asked_for(
    tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path
) -> None:
    options = ("-m", "int8", "--calibration", recorded / "stats.safetensors")
    plain = convert(tiny_pipeline_folder, tmp_path / "plain", "-m", "int8")
    unasked = convert(tiny_pipeline_folder, tmp_path / "unasked", *options)
    asked = convert(tiny_pipeline_folder, tmp_path / "asked", *options, "--rounding", "gptq")
    assert all(torch.equal(tensor, unasked[name]) for name, tensor in plain.items())
    assert any(not torch.equal(tensor, asked[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("method", ["w4a16", "nf4"])
def test_statistics_give_the_same_bytes_on_any_number_of_threads(
    tiny_pipeline_folder: Path, recorded: Path, tmp_path: Path, method: str
) -> None:
    options = ("-m", method, "--calibration", recorded / "stats.safetensors")
    before, files = torch.get_num_threads(), set()
    for count in (1, 2):
        torch.set_num_threads(count)
        convert(tiny_pipeline_folder, tmp_path / f"{count}", *options, "--workers", f"{count}")
        files.add((tmp_path / f"{count}" / WEIGHTS).read_bytes())
    torch.set_num_threads(before)
    convert(tiny_pipeline_folder, tmp_path / "nearest", *options, "--rounding", "nearest")
    assert len(files) == 1
    assert (tmp_path / "nearest" / WEIGHTS).read_bytes() not in files


ENCODER = ("--component", "text_encoder=w4a16", "--runtime", "diffusers")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (("-m", "w4a16"), ""),
        (
            ("-m", "w4a16", "--rounding", "nearest"),
            "w4a16 leaves activations as they are: the statistics were not used",
        ),
        (("-m", "int8"), "int8 quantizes activations at run time: the statistics were not used"),
        (("-m", "fp8"), ""),
        (("-m", "fp8", "--activation-scheme", "dynamic"), "fp8 quantizes activations at run time: the statistics were"),
        (("-m", "fp8", "--activation-scheme", "dynamic", "--rounding", "gptq"), ""),
        (("-m", "int8", "--rounding", "auto"), ""),
        (("-m", "int8", "--rounding", "auto", "--rotate", "--dialect", "comfyui"), "the statistics were not used"),
        (
            ("-m", "int8", "--component", "vae=fp8_storage", "--runtime", "diffusers", "--rounding", "gptq"),
            "fp8_storage leaves activations as they are: the statistics were not used",
        ),
        (("-m", "w4a16", *ENCODER), "whose weights are rounded to nearest"),
        (("-m", "w4a16", *ENCODER, "--rounding", "gptq"), "the statistics do not cover any layer"),
    ],
)
def test_statistics_that_do_not_serve_are_told(
    tiny_pipeline_folder: Path, recorded: Path, options: tuple[str, ...], note: str
) -> None:
    result = run(tiny_pipeline_folder, "--calibration", recorded / "stats.safetensors", "--dry-run", *options)
    assert result.exit_code == ("do not cover any" in note), result.output
    assert note in result.output
    assert ("the statistics" in result.output) == bool(note)
