"""An output of ours is read only if its weights are what its manifest records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.formats.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def output(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output") / "int8"
    convert_checkpoint(tiny_pipeline_folder, folder, Recipe("int8"))
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def delete_layer(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: each for name, each in tensors.items() if "layers.1.attention.to_q." not in name}, file)


@pytest.mark.parametrize("damage", [flip, delete_layer])
@pytest.mark.parametrize("method", ["dequantize", "keep", "fp8"])
@pytest.mark.parametrize("part", ["pipeline", "component", "file"])
def test_a_changed_output_is_not_read(damage, method: str, part: str, output: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(output, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / WEIGHTS
    damage(file)
    source = {"pipeline": tmp_path / "model", "component": file.parent, "file": file}[part]
    with pytest.raises(CheckpointError):
        convert_checkpoint(source, tmp_path / "out", Recipe(method))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_flipped_bit_is_named(part: str, output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "model")
    flip(tmp_path / "model" / "transformer" / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"transformer/{WEIGHTS}: found SHA-256 .* as {MANIFEST} says"):
        convert_checkpoint(tmp_path / "model" / part, tmp_path / "out", Recipe("dequantize"))


def test_what_is_not_read_may_have_changed(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "model")
    flip(next((tmp_path / "model" / "vae").glob("*.safetensors")))
    convert_checkpoint(tmp_path / "model" / "transformer", tmp_path / "one", Recipe("dequantize"))
    convert_checkpoint(output / "transformer", tmp_path / "unchanged", Recipe("dequantize"))
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "unchanged" / WEIGHTS).read_bytes()


def test_a_file_that_the_manifest_does_not_name_is_not_compared(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    del manifest["files"][f"transformer/{WEIGHTS}"]
    (tmp_path / "model" / MANIFEST).write_text(json.dumps(manifest))
    flip(tmp_path / "model" / "transformer" / WEIGHTS)
    convert_checkpoint(tmp_path / "model", tmp_path / "out", Recipe("dequantize"))
    plain = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert plain
    assert not any(name.endswith("_scale") for name in plain)
