"""A quantized model whose config.json lost its block is an error everywhere: nobody takes codes for weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders import load_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


def without_block(folder: Path) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("method", ["fp8", "int8", "mxfp4", "nvfp4", "w4a16"])
def test_codes_without_a_block_are_refused_by_the_config_s_name(
    method: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    options = {"group_size": 64} if method == "w4a16" else {}
    recipe = Recipe(method=method, search=False, **options)  # type: ignore[arg-type]  # as typed there
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    path = without_block(tmp_path / "out" / "transformer")
    with pytest.raises(CheckpointError, match="restore the file, or convert again") as caught:
        load_pipeline(tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: found no quantization_config, but 'context_refiner.0.")
    with pytest.raises(CheckpointError, match="found no quantization_config"):
        load_pipeline(tmp_path / "out", quantization="int8")
    report = json.loads(CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--json"]).stdout)
    assert "no-block" in {found["check"] for each in report["components"] for found in each["findings"]}


def test_a_text_encoder_s_lost_block_is_noticed_by_generate(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(component={"text_encoder": "fp8"}))
    path = without_block(tmp_path / "out" / "text_encoder")
    output = tmp_path / "out.png"
    result = CliRunner().invoke(main, ["generate", str(tmp_path / "out"), "--prompt", "x", "-o", str(output)])
    assert result.exit_code == 1
    assert f"Error: {path}: found no quantization_config" in result.stderr
    assert not output.exists()


def test_weights_that_were_only_cast_to_fp8_are_loaded(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / WEIGHTS
    name = "layers.0.attention.to_q.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    weight = load_pipeline(tmp_path / "model").transformer.get_parameter(name)
    assert weight.equal(tensors[name].to(torch.bfloat16))


@pytest.mark.parametrize("method", ["fp8", "nvfp4"])
@pytest.mark.parametrize("part", ["", "transformer"])
def test_the_manifest_tells_what_a_model_without_its_block_was(
    method: str, part: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method=method, search=False))
    without_block(tmp_path / "out" / "transformer")
    for command in ("inspect", "verify"):
        output = CliRunner().invoke(main, [command, str(tmp_path / "out" / part), "--json"]).stdout
        name = "" if part else "transformer"
        (transformer,) = [each for each in json.loads(output)["components"] if each["name"] == name]
        assert transformer["dialect"] == "vllm-omni"
    text = CliRunner().invoke(main, ["inspect", str(tmp_path / "out" / part)]).stdout
    assert "omni_convert.loaders: refuses: config.json lost its quantization_config; restore the file" in text
    (tmp_path / "out" / "omni_convert.json").unlink()
    assert "lost its quantization_config" not in CliRunner().invoke(main, ["inspect", str(tmp_path / "out")]).stdout
