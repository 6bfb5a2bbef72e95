from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError

FUZZ_EXAMPLES = int(os.environ.get("OMNI_CONVERT_FUZZ_EXAMPLES", "500"))
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
TENSORS = {
    "blocks.0.weight": torch.arange(12.0).reshape(4, 3),
    "blocks.1.weight": torch.arange(1024, dtype=torch.bfloat16).reshape(32, 32),
    "scale": torch.tensor(2.5),
}
WEIGHT_MAP = dict(zip(TENSORS, SHARDS, strict=True))


def write_index(folder: Path, weight_map: object, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A component folder of three shards, a tensor each, and their index."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    for file, (name, tensor) in zip(SHARDS, TENSORS.items(), strict=True):
        save_file({name: tensor}, folder / file, metadata={"format": "pt"})
    write_index(folder, WEIGHT_MAP)
    return folder


def refused(path: Path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    return message


def assert_holds(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    assert dict(checkpoint) == {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_shards_with_an_index(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert_holds(checkpoint, TENSORS)
        assert checkpoint.path == folder
        assert list(checkpoint.files) == SHARDS
        assert checkpoint.weight_map == WEIGHT_MAP
        assert torch.equal(checkpoint.read_rows("blocks.0.weight", 1, 3), TENSORS["blocks.0.weight"][1:3])
        rows = checkpoint.rows("blocks.1.weight")
        assert rows.shape == (32, 32)
        assert torch.equal(rows.read(30, 32), TENSORS["blocks.1.weight"][30:])
    with pytest.raises(ValueError, match="after close"):
        checkpoint.read("scale")


@pytest.mark.parametrize(
    "name", [SINGLE, "model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "x.safetensors"]
)
def test_a_folder_with_one_file(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    assert_holds(Checkpoint.open(tmp_path), TENSORS)


def test_a_usual_name_goes_before_variants(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    save_file({"half": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_holds(Checkpoint.open(tmp_path), TENSORS)


def test_a_file_by_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "any.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "any.safetensors")
    assert list(Checkpoint.open(tmp_path / "any.safetensors").files) == ["any.safetensors"]
    assert_holds(Checkpoint.open(tmp_path / "link.safetensors"), TENSORS)  # named by the user, not by a checkpoint


def test_a_whole_set_of_shards_needs_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert_holds(Checkpoint.open(folder), TENSORS)


def test_real_models_as_save_pretrained_leaves_them(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen3ForCausalLM

    model = ZImageTransformer2DModel.from_pretrained(tiny_pipeline_folder / "transformer", torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    encoder = Qwen3ForCausalLM.from_pretrained(tiny_pipeline_folder / "text_encoder", dtype=torch.bfloat16)
    encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    for component in ("transformer", "text_encoder"):
        whole, sharded = (Checkpoint.open(folder / component) for folder in (tiny_pipeline_folder, tmp_path))
        assert len(whole.files) == 1
        assert len(sharded.files) > 3
        (file,) = (tiny_pipeline_folder / component).glob("*.safetensors")
        assert_holds(sharded, load_file(file))
        assert sharded.fingerprint() == whole.fingerprint()


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_files(folder: Path, tmp_path: Path) -> None:
    fingerprint = Checkpoint.open(folder).fingerprint()
    save_file(TENSORS, tmp_path / "whole.safetensors", metadata={"other": "metadata"})
    assert Checkpoint.open(tmp_path / "whole.safetensors").fingerprint() == fingerprint
    for change in (
        {"scale": torch.tensor(2.25)},
        {"scale": torch.tensor([2.5])},
        {"scale": torch.tensor(2.5).view(torch.int32)},
        {"extra": torch.ones(1)},
    ):
        save_file(TENSORS | change, tmp_path / "changed.safetensors")
        assert Checkpoint.open(tmp_path / "changed.safetensors").fingerprint() != fingerprint


def test_the_fingerprint_samples_a_large_tensor_from_its_first_to_its_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"w": torch.zeros(1 << 20, dtype=torch.uint8)}, path)
    first = path.stat().st_size - (1 << 20)
    fingerprints = {Checkpoint.open(path).fingerprint()}
    for position in (first, first + (1 << 20) // 3, first + (2 << 20) // 3, -1):
        flip(path, position)
        fingerprints.add(Checkpoint.open(path).fingerprint())
    assert len(fingerprints) == 5


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Path:
    """The folder's files as the Hub cache holds them: links from the snapshot to blobs named by hash."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc" / "transformer"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, repository / "blobs" / f"sha{number}")
        (snapshot / file.name).symlink_to(f"../../../blobs/sha{number}")
    return snapshot


def test_links_of_a_hub_snapshot_work(snapshot: Path) -> None:
    assert_holds(Checkpoint.open(snapshot), TENSORS)


def test_blobs_that_repositories_share_work(snapshot: Path) -> None:
    blobs = snapshot.parents[2] / "blobs"
    shared = snapshot.parents[3] / "blobs" / "5b"
    shared.mkdir(parents=True)
    for blob in list(blobs.iterdir()):
        shutil.move(blob, shared / blob.name)
        blob.symlink_to(f"../../blobs/5b/{blob.name}")
    assert_holds(Checkpoint.open(snapshot), TENSORS)


def test_a_link_to_a_snapshot_works(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(snapshot)
    assert_holds(Checkpoint.open(tmp_path / "here"), TENSORS)


def test_a_snapshot_may_not_lead_out_of_its_cache(snapshot: Path, tmp_path: Path) -> None:
    blob = (snapshot / SHARDS[1]).resolve()
    shutil.move(blob, tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    assert "found a link that leaves the folder" in refused(snapshot)


@pytest.mark.parametrize("name", [SHARDS[0], INDEX])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    assert f"{name}: found a link that leaves the folder" in refused(folder)


def test_a_link_within_the_folder_works(folder: Path) -> None:
    shutil.move(folder / SHARDS[0], folder / "stored")
    (folder / SHARDS[0]).symlink_to("stored")
    assert_holds(Checkpoint.open(folder), TENSORS)


@pytest.mark.parametrize(
    "entry",
    [
        f"../{SHARDS[0]}",
        f"{{folder}}/{SHARDS[0]}",
        f"sub/{SHARDS[0]}",
        f"./{SHARDS[0]}",
        f"..\\{SHARDS[0]}",
        f"{SHARDS[0]}\n",
        "a\0.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        7,
        None,
        [SHARDS[0]],
        {"file": SHARDS[0]},
    ],
    ids=str,
)
def test_an_index_names_files_of_its_folder_and_nothing_else(folder: Path, entry: object) -> None:
    outside = entry.format(folder=folder) if isinstance(entry, str) else entry
    write_index(folder, WEIGHT_MAP | {"scale": outside})
    assert "tensor 'scale': found " in refused(folder)
    assert "expected the name of a .safetensors file in the same folder" in refused(folder)


def deep(depth: int) -> str:
    return '{"weight_map": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found damaged JSON"),
        ("{", "found damaged JSON"),
        ("\ufeff{}", "found damaged JSON"),
        (deep(100_000), "found damaged JSON"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "found damaged JSON ('a' occurs twice)"),
        ("[]", "found a JSON list, expected an object"),
        ("{}", "found no 'weight_map'"),
        ('{"weight_map": {}}', "found no 'weight_map'"),
        ('{"weight_map": ["a"]}', "found no 'weight_map'"),
        (deep(100), "found no 'weight_map'"),
        (" " * (9 << 20), "found 9437184 bytes, expected a JSON file of a few kilobytes"),
    ],
    ids=range(11),
)
def test_a_damaged_index(folder: Path, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)
    assert f"{INDEX}: {message}" in refused(folder)


def test_an_index_that_is_not_utf_8(folder: Path) -> None:
    (folder / INDEX).write_bytes(b'{"weight_map": {"\xff": 1}}')
    assert "found damaged JSON" in refused(folder)


def remove_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def break_link_to_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("nothing")


def link_shard_in_a_circle(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(SHARDS[1])


def break_link_to_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("nothing")


def pipe_as_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])


def pipe_as_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


def truncate_shard(folder: Path) -> None:
    os.truncate(folder / SHARDS[1], (folder / SHARDS[1]).stat().st_size - 1)


def second_index(folder: Path) -> None:
    write_index(folder, WEIGHT_MAP, "model.safetensors.index.json")


def single_file_too(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE)


def tensor_only_in_index(folder: Path) -> None:
    write_index(folder, WEIGHT_MAP | {"ghost": SHARDS[0]})


def tensor_only_in_shard(folder: Path) -> None:
    save_file({"scale": TENSORS["scale"], "extra": torch.ones(1)}, folder / SHARDS[2])


def tensor_in_another_shard(folder: Path) -> None:
    write_index(folder, WEIGHT_MAP | {"scale": SHARDS[0], "blocks.0.weight": SHARDS[2]})


def tensor_in_two_shards(folder: Path) -> None:
    save_file({"scale": TENSORS["scale"], "blocks.0.weight": torch.ones(4, 3)}, folder / SHARDS[2])


def two_totals(folder: Path) -> None:
    other = SHARDS[2].replace("of-00003", "of-00004")
    shutil.move(folder / SHARDS[2], folder / other)
    write_index(folder, WEIGHT_MAP | {"scale": other})


def shard_not_in_index(folder: Path) -> None:
    write_index(folder, {name: file for name, file in WEIGHT_MAP.items() if file != SHARDS[2]})


def shard_missing_without_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SHARDS[0]).unlink()


def two_sets_without_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file(TENSORS, folder / "other.safetensors")


def both_usual_names(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    save_file(TENSORS, folder / SINGLE)
    save_file(TENSORS, folder / "model.safetensors")


def pickles_only(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    torch.save(TENSORS, folder / "diffusion_pytorch_model.bin")


def nothing_there(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()


def whole_pipeline(folder: Path) -> None:
    nothing_there(folder)
    (folder / "model_index.json").write_text("{}")


def no_tensors(folder: Path) -> None:
    nothing_there(folder)
    save_file({}, folder / SINGLE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, f"{SHARDS[1]}: the file is missing"),
        (break_link_to_shard, f"{SHARDS[1]}: the file is missing"),
        (link_shard_in_a_circle, f"{SHARDS[1]}: the file is missing"),
        (break_link_to_index, f"{INDEX}: the file is missing"),
        (pipe_as_shard, f"{SHARDS[1]}: found a folder or device"),
        (pipe_as_index, f"{INDEX}: found a folder or device"),
        (truncate_shard, f"{SHARDS[1]}: found 2047 bytes of tensors, expected 2048; the file is truncated"),
        (second_index, f"found both {INDEX} and model.safetensors.index.json, expected one set of weights"),
        (single_file_too, f"found both {INDEX} and {SINGLE}, expected one set of weights"),
        (tensor_only_in_index, f"tensor 'ghost': found in no shard, expected in {SHARDS[0]} by the index"),
        (tensor_only_in_shard, f"tensor 'extra': found in {SHARDS[2]}, expected in none by the index"),
        (tensor_in_another_shard, f"'blocks.0.weight': found in {SHARDS[0]}, expected in {SHARDS[2]} by the index"),
        (tensor_in_two_shards, f"found tensor 'blocks.0.weight' in {SHARDS[0]} and in {SHARDS[2]}, expected it once"),
        (two_totals, "found shards of 3 and of 4"),
        (shard_not_in_index, "found 2 shards of 'diffusion_pytorch_model', expected numbers 1 to 3"),
        (shard_missing_without_index, "found 2 shards of 'diffusion_pytorch_model', expected numbers 1 to 3"),
        (two_sets_without_index, "found 4 .safetensors files"),
        (both_usual_names, f"found both {SINGLE} and model.safetensors"),
        (pickles_only, "found the pickle 'diffusion_pytorch_model.bin', which can run code when it is read"),
        (nothing_there, f"found no weights, expected {SINGLE} or its shards"),
        (whole_pipeline, "found a whole pipeline, expected one component"),
        (no_tensors, "found no tensors, expected the weights of a model"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_folder_that_is_not_what_it_claims(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    assert message in refused(folder)


def test_paths_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.pt")
    (tmp_path / "model.onnx").write_bytes(b"ONNX")
    assert "found the pickle 'model.pt', which can run code" in refused(tmp_path / "model.pt")
    assert "save_pretrained(..., safe_serialization=True)" in refused(tmp_path / "model.pt")
    assert "found a '.onnx' file, expected a component folder, a .safetensors or a .gguf file" in refused(
        tmp_path / "model.onnx"
    )
    assert "nothing is there" in refused(tmp_path / "none")
    assert "found shard 2 of 3, expected a whole checkpoint; name the folder" in refused(folder / SHARDS[1])


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
files = st.sampled_from(SHARDS) | st.sampled_from(["none.safetensors", "../a.safetensors", "/a.safetensors"])
weight_maps = st.dictionaries(st.sampled_from([*TENSORS, "ghost"]) | st.text(max_size=3), files | json_values)
indices = st.one_of(
    st.builds(json.dumps, json_values),
    st.builds(lambda weight_map: json.dumps({"weight_map": weight_map}), weight_maps),
    st.builds(lambda changes: json.dumps({"weight_map": WEIGHT_MAP | changes, "x": []}), weight_maps),
    st.text(max_size=40),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


@settings(
    max_examples=FUZZ_EXAMPLES,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=indices | st.binary(max_size=40))
def test_any_index_ends_in_the_right_tensors_or_in_one_line(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    result = open_or_error(folder)
    if isinstance(result, CheckpointError):
        assert len(str(result).splitlines()) == 1
    else:
        assert json.loads(content)["weight_map"] == WEIGHT_MAP
        assert_holds(result, TENSORS)


def open_or_error(path: Path) -> Checkpoint | CheckpointError:
    try:
        return Checkpoint.open(path)
    except CheckpointError as error:
        return error
