"""scripts/same_bytes.py finds every byte that differs, and lets wordings differ."""

import argparse
import json
import shutil

import pytest
import same_bytes
import torch
from safetensors.torch import load_file, save_file

CASE = "glm_image/fp8.vllm-omni"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one case."""
    folder = tmp_path_factory.mktemp("same") / "before"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        same_bytes.make(argparse.Namespace(folder=folder, only=[CASE], fresh=False))
    return folder


@pytest.fixture
def compare(made, tmp_path):
    """Applies a change to a copy of the case; returns the exit status of comparing."""

    def call(change):
        after = shutil.copytree(made, tmp_path / "after")
        change(after / CASE)
        return same_bytes.compare(argparse.Namespace(before=made, after=after, only=[], texts=False))

    return call


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def test_equal_folders_do_not_differ(compare, capsys):
    assert compare(lambda case: None) == 0
    assert capsys.readouterr().out == "1 cases in both, 0 only before, 0 only after\n0 cases differ\n"


def test_a_weight_that_differs_is_named(compare, capsys):
    def change(case):
        (file,) = (case / "out").glob("*.safetensors")
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name] = tensors[name] + torch.ones_like(tensors[name])
        save_file(tensors, file)

    assert compare(change) == 1
    assert "has other values" in capsys.readouterr().out


def test_a_reason_may_be_reworded(compare):
    def change(manifest):
        kept = manifest["components"][""]["kept"]
        assert kept
        kept[next(iter(kept))] = "for another reason"

    assert compare(lambda case: edit_json(case / "out" / "omni_convert.json", change)) == 0


@pytest.mark.parametrize("name", ["out/config.json", "out/omni_convert.json", "status.json"])
def test_a_fact_that_is_new_is_a_difference(compare, name):
    assert compare(lambda case: edit_json(case / name, lambda content: content.update(more=1))) == 1


def test_a_file_too_many_is_a_difference(compare, capsys):
    assert compare(lambda case: (case / "out" / "more.txt").write_text("")) == 1
    assert f"{CASE}: out/more.txt is only after" in capsys.readouterr().out
