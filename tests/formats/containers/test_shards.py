from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from omni_convert.formats.containers.safetensors_writer import SafetensorsWriter
from omni_convert.formats.containers.shards import WEIGHTS_NAMES, ShardName, check_shard_names, plan_shards
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError, RecipeError

DIFFUSERS, TRANSFORMERS = WEIGHTS_NAMES
SIZES = ("1KB", "10KB", "32KB", 20_000, "5GB")


def diffusers_model() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2)


def transformers_model() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,  # so that layer 10 sorts before layer 2
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).bfloat16()


@pytest.mark.parametrize(
    ("build", "weights_name"), [(diffusers_model, DIFFUSERS), (transformers_model, TRANSFORMERS)], ids=WEIGHTS_NAMES
)
def test_files_and_index_are_those_of_save_pretrained(tmp_path: Path, build: Any, weights_name: str) -> None:
    torch.manual_seed(0)
    model = build()
    state = model.state_dict()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    for position, size in enumerate(SIZES):
        theirs, ours = tmp_path / f"theirs{position}", tmp_path / f"ours{position}"
        model.save_pretrained(theirs, max_shard_size=size)
        shards = plan_shards(specs, size, weights_name)
        ours.mkdir()
        for file, members in shards.files.items():
            with SafetensorsWriter(ours / file, sorted(members, key=lambda spec: spec.name)) as writer:
                for spec in members:
                    writer.write(spec.name, state[spec.name])
        files = sorted(path.name for path in theirs.glob("*.safetensors"))
        assert sorted(path.name for path in ours.iterdir()) == files
        for file in files:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
        assert_same_index(shards.index, theirs / shards.index_name)
    assert len(files) == 1  # the last size holds all, the ones before did not
    assert len(list((tmp_path / "theirs0").glob("*.safetensors"))) > 10


def assert_same_index(index: dict[str, Any] | None, path: Path) -> None:
    if index is None:
        assert not path.exists()
        return
    text = path.read_text()
    if '"total_parameters"' in text:  # transformers counts parameters too, which packed weights do not have
        expected = json.loads(text)
        del expected["metadata"]["total_parameters"]
        text = json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert json.dumps(index, indent=2) + "\n" == text


def test_diffusers_loads_what_was_planned_here(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = diffusers_model()
    state = model.state_dict()
    model.save_config(tmp_path)
    shards = plan_shards([TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in state.items()], "20KB", DIFFUSERS)
    for file, members in shards.files.items():
        with SafetensorsWriter(tmp_path / file, members) as writer:
            for spec in members:
                writer.write(spec.name, state[spec.name])
        assert load_file(tmp_path / file).keys() == {spec.name for spec in members}
    (tmp_path / shards.index_name).write_text(json.dumps(shards.index))
    loaded = AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    specs = [TensorSpec(name, torch.uint8, (size,)) for name, size in (("a", 4), ("b", 100), ("c", 4), ("d", 8))]
    files = plan_shards(specs, 10, DIFFUSERS).files
    assert sorted([spec.name for spec in members] for members in files.values()) == [["a", "c"], ["b"], ["d"]]


@pytest.mark.parametrize("size", ["", "5", "5 G", "many GB", "infGB", "nanGB"])
def test_a_size_that_means_nothing(size: str) -> None:
    with pytest.raises(RecipeError, match=r"--max-shard-size: found .* expected a size like 5GB"):
        plan_shards([TensorSpec("a", torch.uint8, (1,))], size, DIFFUSERS)


def test_shard_names() -> None:
    assert ShardName.parse("model-00002-of-00003.safetensors") == ShardName("model", 2, 3)
    for name in ("model.safetensors", "model-2-of-3.safetensors", "model-00002-of-00003.bin", "-00001-of-00001"):
        assert ShardName.parse(name) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a-00001-of-00002", "a-00003-of-00003"], "found shards of 2 and of 3 .as a-00003-of-00003.safetensors."),
        (["a-00001-of-00003", "a-00003-of-00003"], "found 2 shards of 'a', expected numbers 1 to 3"),
        (["a-00000-of-00001", "a-00001-of-00001"], "found 2 shards of 'a', expected numbers 1 to 1"),
        (["a-00001-of-00000"], "found 1 shards of 'a', expected numbers 1 to 0"),
    ],
)
def test_shards_that_contradict_each_other(files: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"HERE: {message}"):
        check_shard_names([f"{file}.safetensors" for file in files], "HERE")


def test_shards_that_agree() -> None:
    check_shard_names(["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "other.safetensors"], "HERE")
