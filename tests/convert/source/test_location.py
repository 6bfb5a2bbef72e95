from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni_convert.convert.source.location import DEMO_PIPELINE, resolve_source
from omni_convert.formats.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(pipeline: Path, cache: Path, repo_id: str) -> None:
    """The pipeline as huggingface_hub keeps a repository: snapshots that are links into a folder of blobs."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for path in sorted(pipeline.rglob("*")):
        if path.is_file():
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            link = repository / "snapshots" / COMMIT / path.relative_to(pipeline)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


def offline(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-m", "omni_convert.convert.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_repo_id_is_read_from_the_hubs_cache(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    hub_cache(tiny_pipeline_folder, tmp_path / "cache", "someone/tiny")
    result = offline(tmp_path / "cache", "someone/tiny", "-m", "int8", "-o", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "omni_convert.json").read_text())
    assert manifest["source"] == {"name": "someone/tiny", "revision": COMMIT}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/tiny" in card
    assert "base_model_relation: quantized" in card
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_repo_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    result = offline(tmp_path / "cache", "someone/absent", "-o", str(tmp_path / "out"))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: someone/absent: no local path of that name")
    assert not (tmp_path / "out").exists()


def test_without_a_model_the_demo_is_meant() -> None:
    source = resolve_source(None)
    assert source.path == DEMO_PIPELINE


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle checkpoint, expected safetensors"):
        resolve_source(tmp_path / name)


def pipeline_of(folder: Path, index: object) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_components_are_what_has_a_library_and_a_class(tmp_path: Path) -> None:
    index = {"_class_name": "X", "vae": ["diffusers", "Y"], "image_encoder": [None, None], "scale": 2, "sizes": [1, 2]}
    index |= {"empty": [], "wrapped": [["diffusers", "Z"]], "one": ["diffusers"]}
    assert resolve_source(pipeline_of(tmp_path / "model", index)).components == {"vae": "diffusers"}


@pytest.mark.parametrize("name", ["..", ".", "", "../elsewhere", "/etc", "a/b", "a\\b", "a\nb", "a\0b", "x" * 256])
def test_a_component_never_leads_out_of_the_pipeline(tmp_path: Path, name: str) -> None:
    folder = pipeline_of(tmp_path / "model", {"_class_name": "X", name: ["diffusers", "Y"]})
    with pytest.raises(CheckpointError, match="expected the name of a folder; do not trust") as caught:
        _ = resolve_source(folder).components
    assert "\n" not in str(caught.value)
