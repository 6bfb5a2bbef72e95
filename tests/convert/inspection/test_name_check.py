"""`verify` knows from config.json alone which tensors a model has, and says nothing where it cannot know."""

from __future__ import annotations

import json
import re
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, T5Config, T5EncoderModel

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.convert.inspection.name_check import MOST_FINDINGS
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.families.table import find_family
from omni_convert.formats.finding import Finding

WEIGHTS = "diffusion_pytorch_model.safetensors"
NORM, BIAS = "layers.0.attention.norm_q.weight", "t_embedder.mlp.0.bias"
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
NESTED: list[Any] = reduce(lambda inner, _: [inner], range(400), [])
RECIPES = {
    "fp8": Recipe(component={"text_encoder": "fp8"}),
    "int8": Recipe(method="int8", runtime="diffusers", component={"vae": "fp8_storage"}),
    "mxfp4_dualscale": Recipe(method="mxfp4_dualscale", search=False),
    "w4a16": Recipe(method="w4a16", group_size=64, search=False),
    "comfyui": Recipe(method="nvfp4", dialect="comfyui", search=False),
    "compressed-tensors": Recipe(method="mxfp8", dialect="compressed-tensors", search=False),
    "msmodelslim": Recipe(method="int8", dialect="msmodelslim"),
}


def findings_of(folder: Path) -> tuple[Finding, ...]:
    components = verify_source(Source(folder, str(folder)))
    return tuple(found for component in components for found in component.findings)


def converted(source: Path, folder: Path, recipe: Recipe) -> Path:
    """A conversion as somebody else's tool would leave it: without a manifest."""
    convert_checkpoint(source, folder, recipe)
    (folder / MANIFEST).unlink()
    return folder


def change(file: Path, *without: str, **more: torch.Tensor) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in without}
    save_file(tensors | more, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", RECIPES)
def test_whole_models_have_all_their_tensors_and_no_others(
    name: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    assert findings_of(converted(tiny_pipeline_folder, tmp_path / "out", RECIPES[name])) == ()


def test_models_that_are_not_quantized_are_whole_too(tiny_pipeline_folder: Path, flux_folder: Path) -> None:
    assert findings_of(tiny_pipeline_folder) == findings_of(flux_folder) == ()


@pytest.mark.parametrize("name", [NORM, BIAS])
@pytest.mark.parametrize("method", ["fp8", "w4a16", None])
def test_a_missing_tensor_that_is_not_quantized_is_an_error(
    method: str | None, name: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    if method is None:
        shutil.copytree(tiny_pipeline_folder, tmp_path / "out")
    else:
        converted(tiny_pipeline_folder, tmp_path / "out", RECIPES[method])
    change(tmp_path / "out" / "transformer" / WEIGHTS, name)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--json"])
    (found,) = [found for each in json.loads(result.stdout)["components"] for found in each["findings"]]
    assert (found["check"], found["severity"], found["layer"]) == ("missing-tensor", "error", name)
    assert "ZImageTransformer2DModel" in found["what"]
    assert result.exit_code == 1


def test_a_tensor_that_the_model_has_no_use_for_is_a_warning(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = converted(tiny_pipeline_folder, tmp_path / "out", Recipe())
    change(folder / "transformer" / WEIGHTS, **{"layers.9.scale": torch.ones(3)})
    (found,) = findings_of(folder)
    assert (found.check, found.severity, found.layer) == ("unknown-names", "warning", "layers.9.scale")


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "ZImageTransformer2DModel"},
        {"_class_name": "NobodysModel", "dim": 192},
        {"_class_name": "ZImageTransformer2DModel", "dim": "wide"},
        {"_class_name": "ZImageTransformer2DModel", "n_layers": 10**9},
        {"_class_name": "UNet2DConditionModel", "transformer_layers_per_block": [10**8, 1, 1, 1]},
        {"_class_name": "FluxTransformer2DModel", "num_layers": 1},
        {"_class_name": "DiffusionPipeline", "n_layers": 2},
        {"architectures": ["Qwen3Model"], "model_type": "qwen3", "hidden_size": -1},
        {"architectures": ["Qwen3Model"], "model_type": "qwen3", "head_dim": 0},
        {"_class_name": "ZImageTransformer2DModel", "dim": 192, "n_heads": 0},
        {"_class_name": "ZImageTransformer2DModel", "axes_dims": NESTED},
        {"architectures": [3]},
        {},
    ],
    ids=[
        "class alone",
        "unknown",
        "refused",
        "endless",
        "endless in a list",
        "another model",
        "no model",
        "damaged",
        "no head",
        "no heads",
        "nested",
        "no name",
        "none",
    ],
)
def test_where_the_class_cannot_tell_nothing_is_said(
    config: dict[str, Any], tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pipeline_folder / "transformer", tmp_path / "model")
    change(tmp_path / "model" / WEIGHTS, NORM)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert findings_of(tmp_path / "model") == ()


@pytest.mark.parametrize(
    "model",
    [
        T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)),
        CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)),
    ],
    ids=["tied", "positions"],
)
def test_text_encoders_are_known_by_their_class(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    assert findings_of(tmp_path / "model") == ()
    file = next((tmp_path / "model").glob("*.safetensors"))
    lost = next(name for name in load_file(file) if "norm" in name)
    change(file, lost)
    (found,) = findings_of(tmp_path / "model")
    assert (found.check, found.layer) == ("missing-tensor", lost)


def test_names_that_transformers_may_translate_are_left_to_it(tmp_path: Path) -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
    T5EncoderModel(config).save_pretrained(tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    change(file, "shared.weight", **{"embed.weight": load_file(file)["shared.weight"]})
    assert findings_of(tmp_path / "model") == ()


def test_counts_that_multiply_do_not_build_forever(tmp_path: Path) -> None:
    settings = {"layers_per_block": 999, "transformer_layers_per_block": 999}
    model = UNet2DConditionModel(block_out_channels=(32, 64), down_block_types=DOWN, up_block_types=UP)
    model.save_pretrained(tmp_path / "model")
    change(tmp_path / "model" / WEIGHTS, "conv_in.bias")
    assert [found.layer for found in findings_of(tmp_path / "model")] == ["conv_in.bias"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | settings))
    assert findings_of(tmp_path / "model") == ()


def test_a_model_under_its_original_names_is_left_alone(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    transformer = tiny_pipeline_folder / "transformer"
    tensors = load_file(transformer / WEIGHTS)
    with Checkpoint.open(transformer) as checkpoint:
        found = find_family("ZImageTransformer2DModel").original_tensors(checkpoint)
    assert found is not None
    originals = {name: torch.cat([tensors[run.source] for run in each.runs]) for name, each in found.items()}
    assert not originals.keys() <= tensors.keys()
    save_file(originals, tmp_path / "z_image_turbo_bf16.safetensors", metadata={"format": "pt"})
    shutil.copy(transformer / "config.json", tmp_path)
    assert findings_of(tmp_path) == ()


def test_a_file_of_any_name_under_diffusers_names_is_checked(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(tiny_pipeline_folder / "transformer" / WEIGHTS, file)
    shutil.copy(tiny_pipeline_folder / "transformer" / "config.json", tmp_path)
    change(file, NORM)
    (found,) = findings_of(tmp_path)
    assert (found.check, found.layer) == ("missing-tensor", NORM)


def test_names_of_a_tool_that_is_not_known_are_its_own(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """The tensors of a weight as quanto stores it."""
    shutil.copytree(tiny_pipeline_folder / "transformer", tmp_path / "model")
    stem = "layers.0.attention.to_q.weight"
    rows, columns = load_file(tmp_path / "model" / WEIGHTS)[stem].shape
    codes = {f"{stem}._data": torch.ones(rows, columns, dtype=torch.int8), f"{stem}._scale": torch.ones(rows, 1)}
    change(tmp_path / "model" / WEIGHTS, stem, **codes)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    block = {"quant_method": "quanto", "weights_dtype": "int8"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    assert [found.check for found in findings_of(tmp_path / "model")] == ["unreadable-layer"]


def test_one_of_several_names_of_a_tensor_is_enough(tmp_path: Path) -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
    T5EncoderModel(config).save_pretrained(tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    shared = load_file(file)["shared.weight"]
    change(file, "shared.weight", **{"encoder.embed_tokens.weight": shared})
    assert findings_of(tmp_path / "model") == ()
    change(file, "encoder.embed_tokens.weight")
    (found,) = findings_of(tmp_path / "model")
    assert (found.check, found.layer) == ("missing-tensor", "shared.weight")


def test_of_many_missing_tensors_the_first_are_named(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline_folder / "transformer", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_layers": 32}))
    found = findings_of(tmp_path / "model")
    assert len(found) == MOST_FINDINGS
    assert re.search(r"; so \d+ more$", found[-1].what)
