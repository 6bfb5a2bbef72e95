"""Only the files that are loaded decide whether a component holds quantized layers that its config does not declare."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders import kernel_report, load_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME = "layers.0.attention.to_q.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def quantized(tensors):
    codes = tensors[NAME].to(torch.float8_e4m3fn)
    return tensors | {NAME: codes, NAME.replace("weight", "weight_scale"): torch.ones(())}


def save(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline_folder, tmp_path / "pipeline"))


@pytest.fixture
def in_cache(folder: Path, tmp_path: Path) -> Path:
    """The pipeline as the repository `owner/name` in a cache of the Hub."""
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    return Path(shutil.move(folder, repository / "snapshots" / COMMIT))


def shard(component: Path) -> list[Path]:
    """Cuts the weights in two."""
    tensors = load_file(component / WEIGHTS)
    (component / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save(part, component / name)
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (component / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [component / name for name in names]


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one file", "shards"])
def test_a_variant_that_is_not_loaded_is_not_looked_at(folder, is_sharded):
    component = folder / "transformer"
    tensors = load_file(component / WEIGHTS)
    save(quantized(tensors), component / "diffusion_pytorch_model.fp8.safetensors")
    if is_sharded:
        shard(component)
    assert load_pipeline(folder).transformer.get_parameter(NAME).equal(tensors[NAME])


def test_a_variant_that_is_not_loaded_hides_no_codes(folder):
    component = folder / "transformer"
    tensors = load_file(component / WEIGHTS)
    save(tensors, component / "diffusion_pytorch_model.zz.safetensors")
    save(quantized(tensors), component / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"found no quantization_config, but 'layers.0.attention.to_q' holds"):
        load_pipeline(folder)


def test_codes_in_one_shard_are_refused(folder):
    for file in shard(folder / "transformer"):
        tensors = load_file(file)
        if NAME in tensors:
            save(quantized(tensors), file)
    with pytest.raises(CheckpointError, match="found no quantization_config"):
        load_pipeline(folder)


def test_the_variant_that_is_loaded_is_looked_at(folder):
    component = folder / "transformer"
    tensors = load_file(component / WEIGHTS)
    save(quantized(tensors), component / "diffusion_pytorch_model.fp8.safetensors")
    with pytest.raises(CheckpointError, match="found no quantization_config"):
        load_pipeline(folder, variant="fp8")


def test_a_pointer_to_a_file_that_is_not_loaded_is_left_alone(folder):
    (folder / "text_encoder" / "model.fp16.safetensors").write_text(POINTER)
    assert load_pipeline(folder).text_encoder is not None


def test_codes_in_a_repository_of_the_hub_are_refused(in_cache):
    options = {"cache_dir": in_cache.parents[2], "local_files_only": True}
    assert load_pipeline("owner/name", **options).transformer is not None
    file = in_cache / "transformer" / WEIGHTS
    save(quantized(load_file(file)), file)
    with pytest.raises(CheckpointError, match="found no quantization_config"):
        load_pipeline("owner/name", **options)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("nonexistent-folder", "found no such folder"),
        ("a/b/c", "found no such folder"),
        ("~/pipeline", "found no such folder"),
    ],
)
def test_a_folder_that_is_not_there_is_told_in_one_line_of_our_own(model, found, caplog, capfd):
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(model, local_files_only=True)
    expected = "expected the folder of a pipeline, or a repository on the Hub as Qwen/Qwen-Image"
    assert str(caught.value) == f"{model}: {found}, {expected}"
    assert not caplog.records
    assert not any(capfd.readouterr())


def test_a_repository_that_is_not_in_the_cache_is_told_without_the_network(tmp_path):
    with pytest.raises(CheckpointError, match=r"^owner/name: found no such folder and nothing in the cache") as caught:
        load_pipeline("owner/name", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", f"transformer/{WEIGHTS}"])
def test_a_part_of_a_pipeline_is_no_pipeline(pipeline_folder, part):
    with pytest.raises(CheckpointError, match="expected the folder of a pipeline"):
        load_pipeline(pipeline_folder / part)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "msmodelslim", "transformers"])
def test_another_spelling_is_named_with_the_command_that_changes_it(
    tiny_pipeline_folder: Path, tmp_path: Path, dialect: str
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe("mxfp8", dialect=dialect, device="cpu"))
    remedy = f"the spelling of {dialect}.*`omni-convert {tmp_path / 'out'} -m keep --dialect vllm-omni`"
    with pytest.raises(CheckpointError, match=remedy):
        load_pipeline(tmp_path / "out")
    convert_checkpoint(tmp_path / "out", tmp_path / "again", Recipe("keep", dialect="vllm-omni", device="cpu"))
    assert kernel_report(load_pipeline(tmp_path / "again")).layers


def test_the_command_that_is_named_keeps_every_value(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "rows", Recipe("fp8", dialect="modelopt", device="cpu"))
    convert_checkpoint(tmp_path / "rows", tmp_path / "out", Recipe("keep", dialect="compressed-tensors", device="cpu"))
    with pytest.raises(CheckpointError, match="-m keep --dialect modelopt"):
        load_pipeline(tmp_path / "out")


def test_no_command_is_named_that_would_change_values(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """Layers of rotated weights, in a text encoder, of which this loader reads no marks."""
    rotated = Recipe("int8", dialect="comfyui", rotate=True, device="cpu")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", rotated)
    shutil.move(tmp_path / "out" / "transformer" / WEIGHTS, tmp_path / "out" / "text_encoder" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"text_encoder: found the spelling of comfyui.*-m METHOD"):
        load_pipeline(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_codes_that_lost_their_scale_are_no_cast_weights(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    weight = tensors[NAME].float()
    save(tensors | {NAME: weight.to(dtype)}, file)
    assert load_pipeline(folder).transformer.get_parameter(NAME).float().equal(weight.to(dtype).float())
    save(tensors | {NAME: (weight * 440 / weight.abs().max()).to(dtype)}, file)
    with pytest.raises(CheckpointError, match=r"to_q.*RMS.*no scale"):
        load_pipeline(folder)
