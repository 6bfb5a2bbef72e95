"""Diffusion models that diffusers has no class for: repositories of transformers, OmniGen2 and Ming-Image."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_stages
import torch
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.calibration.pipeline_recorder import recording_identity
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.hub_selection import needed_files
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CalibrationError, CheckpointError, RecipeError
from omni_convert.formats.families.family import Family
from omni_convert.formats.statistics.layer_statistics import InputRecorder, observe
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.formats.views.base import dequantized_view

HUNYUAN_DENSE = {
    "model.layers.N.self_attn.qkv_proj",
    "model.layers.N.self_attn.o_proj",
    "model.layers.N.mlp.shared_mlp.gate_and_up_proj",
    "model.layers.N.mlp.shared_mlp.down_proj",
}
HUNYUAN_EXPERTS = {f"model.layers.N.mlp.experts.N.{leaf}_proj" for leaf in ("gate_and_up", "down")}
BAGEL = {
    *(f"language_model.model.layers.N.self_attn.{leaf}_proj{end}" for leaf in "qkvo" for end in ("", "_moe_gen")),
    *(
        f"language_model.model.layers.N.mlp{end}.{leaf}_proj"
        for leaf in ("gate", "up", "down")
        for end in ("", "_moe_gen")
    ),
}
HIDREAM_O1 = {
    *(f"model.language_model.layers.N.self_attn.{leaf}_proj" for leaf in "qkvo"),
    *(f"model.language_model.layers.N.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
}
#: Family and method → the names of the layers that are quantized.
LAYERS = {
    **{("hunyuan_image_3", method): HUNYUAN_DENSE | HUNYUAN_EXPERTS for method in ("fp8", "nvfp4")},
    **{("hunyuan_image_3", method): HUNYUAN_DENSE for method in ("int8", "mxfp8", "mxfp4")},
    **{("bagel", method): BAGEL for method in ("fp8", "nvfp4", "mxfp8", "mxfp4")},
    **{("hidream_o1", method): HIDREAM_O1 for method in ("fp8", "nvfp4", "int8")},
}
IGNORED = {
    "hunyuan_image_3": {f"layers.{number}.mlp.gate" for number in range(2)},
    "bagel": {"bagel.connector.fc1", "bagel.connector.fc2"},
    "hidream_o1": {
        "model.t_embedder1.mlp.0",
        "model.t_embedder1.mlp.2",
        "model.x_embedder.proj1",
        "model.x_embedder.proj2",
        "model.final_layer2.linear",
    },
}
NAMES = [*IGNORED]
NO_CLASS = (
    r"for which neither diffusers nor transformers [\d.]+ has a class, so that no prompt can be run; convert it "
    r"without --calib: activations are then scaled at run time, or stay in BF16$"
)


@pytest.fixture(scope="module")
def converted(
    repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A function of a family and a method: its repository, converted, read-only."""
    folder = tmp_path_factory.mktemp("converted")

    def made(name: str, method: str = "fp8") -> Path:
        if not (folder / name / method).exists():
            convert_checkpoint(repository(name), folder / name / method, Recipe(method=method, max_shard_size="99KB"))
        return folder / name / method

    return made


def block_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def findings(folder: Path) -> set[tuple[str, str]]:
    """Check and layer of every error."""
    (component,) = verify_source(resolve_source(folder))
    return {(finding.check, finding.layer) for finding in component.findings if finding.severity == "error"}


def family_of(folder: Path) -> Family:
    return ComponentFolder(resolve_source(folder), "").family


def outcome(folder: Path) -> str:
    """What `inspect` says that vLLM-Omni does."""
    (component,) = inspect_source(resolve_source(folder))
    return component.runtimes[0].outcome


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("name", "method"), LAYERS)
def test_only_layers_that_the_runtime_has_the_method_for_are_quantized(
    name: str, method: str, converted: Callable[..., Path]
) -> None:
    folder = converted(name, method)
    with open_quantized(folder) as quantized:
        assert {re.sub(r"\d+", "N", stem) for stem in quantized.layers} == LAYERS[name, method]
    assert findings(folder) == set()
    assert outcome(folder) == "loads"


@pytest.mark.parametrize(("name", "method"), LAYERS)
def test_the_block_at_the_top_level_ignores_layers_in_the_spelling_of_the_runtime(
    name: str, method: str, converted: Callable[..., Path]
) -> None:
    block = block_of(converted(name, method))
    assert block["quant_method"] == ("modelopt" if method == "nvfp4" else method)
    listed = {entry.replace("[", "").replace("]", "") for entry in block.get("ignored_layers", block.get("ignore"))}
    assert listed >= IGNORED[name]
    assert not (converted(name, method) / "hf_quant_config.json").exists()


@pytest.mark.parametrize(("name", "method"), LAYERS)
def test_all_other_tensors_and_files_keep_their_bytes(
    name: str, method: str, repository: Callable[[str], Path], converted: Callable[..., Path]
) -> None:
    source, result = repository(name), converted(name, method)
    before, after = tensors_of(source), tensors_of(result)
    with open_quantized(result) as quantized:
        kept = {key for key in before if key.removesuffix(".weight") not in quantized.layers}
    assert kept < before.keys()
    for key in kept:
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    for file in (*tiny_stages.OTHER_FILES, *(file.name for file in source.glob("*_config.json"))):
        assert (result / file).read_bytes() == (source / file).read_bytes()


def test_hunyuan_image_3_with_a_block_without_experts_is_refused(
    repository: Callable[[str], Path], converted: Callable[..., Path], tmp_path: Path
) -> None:
    expected = r"model\.layers\.0\.mlp\.gate_and_up_proj\.weight: found a block without experts"
    for made in (repository("hunyuan_image_3"), converted("hunyuan_image_3")):
        folder = tmp_path / made.name
        shutil.copytree(made, folder)
        index = folder / "model.safetensors.index.json"
        (file,) = (
            path for path in folder.glob("model*.safetensors") if "model.layers.0.mlp.gate.wg.weight" in load_file(path)
        )
        added = {
            f"model.layers.0.mlp.{leaf}_proj.weight": torch.ones(shape, dtype=torch.bfloat16)
            for leaf, shape in {"gate_and_up": (64, 64), "down": (64, 32)}.items()
        }
        save_file(load_file(file) | added, file, metadata={"format": "pt"})
        if index.exists():
            content = json.loads(index.read_text())
            content["weight_map"] |= dict.fromkeys(added, file.name)
            index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=expected):
        convert_checkpoint(tmp_path / repository("hunyuan_image_3").name, tmp_path / "out", Recipe())
    (component,) = verify_source(resolve_source(tmp_path / converted("hunyuan_image_3").name))
    assert any(finding.severity == "error" and re.search(expected, finding.what) for finding in component.findings)


def test_the_vae_of_bagel_is_copied_and_its_model_is_one_file_without_an_index(
    repository: Callable[[str], Path], converted: Callable[..., Path]
) -> None:
    assert sorted(file.name for file in repository("bagel").glob("*.safetensors")) == [
        "ae.safetensors",
        "ema.safetensors",
    ]
    for folder in (converted("bagel"), converted("bagel", "nvfp4")):
        assert (folder / "ae.safetensors").read_bytes() == (repository("bagel") / "ae.safetensors").read_bytes()
        # vLLM-Omni reads the files of an index alone, where there is one.
        assert not list(folder.glob("*.index.json"))
        assert [file.name for file in folder.glob("model*.safetensors")] == ["model.safetensors"]


def test_shards_of_hunyuan_image_3_are_called_as_the_original_calls_them(converted: Callable[..., Path]) -> None:
    index = json.loads((converted("hunyuan_image_3") / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 1
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file) for file in files)


def test_both_experts_of_bagel_share_a_scale(converted: Callable[..., Path]) -> None:
    tensors = tensors_of(converted("bagel"))
    for number in range(2):
        attention = f"language_model.model.layers.{number}.self_attn"
        for leaves in ("qkv", "o"):
            stems = [f"{attention}.{leaf}_proj{end}" for leaf in leaves for end in ("", "_moe_gen")]
            scales = {float(tensors[f"{stem}.weight_scale"]) for stem in stems}
            assert len(scales) == 1


def test_half_of_a_pair_of_experts_keeps_the_other_as_well(repository: Callable[[str], Path], tmp_path: Path) -> None:
    stem = "language_model.model.layers.1.self_attn.q_proj_moe_gen"
    convert_checkpoint(repository("bagel"), tmp_path / "out", Recipe(ignored_layers=(stem,)))
    with open_quantized(tmp_path / "out") as quantized:
        assert not any("layers.1.self_attn.q_proj" in each for each in quantized.layers)
        assert "language_model.model.layers.1.self_attn.o_proj" in quantized.layers
    assert "bagel.language_model.model.layers.1.self_attn.qkv_proj" in block_of(tmp_path / "out")["ignored_layers"]
    assert findings(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hunyuan_image_3", {"weight_block_size": (32, 32)}, "does not sort the scales of .* leave out --weight-block"),
        ("hunyuan_image_3", {"dialect": "modelopt"}, "does not sort the scales of .* or use --dialect vllm-omni$"),
        ("hunyuan_image_3", {"method": "mxfp4_dualscale"}, "does not sort the rows of qkv_proj's second scales"),
        ("hunyuan_image_3", {"method": "mxfp8", "dialect": "modelopt"}, "expected --dialect vllm-omni$"),
        ("bagel", {"method": "int8"}, "transpose INT8 weights of BAGEL twice on CUDA$"),
        ("bagel", {"weight_block_size": (32, 32)}, "takes one scale for each weight; leave out --weight-block-size"),
        ("bagel", {"dialect": "modelopt"}, "takes one scale for each weight; .* or use --dialect vllm-omni$"),
        ("bagel", {"method": "mxfp8", "dialect": "modelopt"}, "takes ModelOpt's MXFP8 for FP8 with one scale$"),
        *(
            (name, options, message)
            for name in NAMES
            for options, message in (
                (
                    {"method": "w4a16", "group_size": 32},
                    "not tried with this model in this dialect; expected vllm-omni",
                ),
                ({"dialect": "compressed-tensors"}, "not tried with this model in this dialect; expected vllm-omni"),
                ({"runtime": "diffusers"}, "a repository of transformers, which vLLM-Omni alone runs quantized$"),
                ({"dialect": "comfyui"}, "a repository of transformers, which vLLM-Omni alone runs quantized$"),
            )
        ),
    ],
)
def test_what_the_runtime_does_not_load_is_refused(
    name: str, options: dict[str, Any], message: str, repository: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        convert_checkpoint(repository(name), tmp_path / "out", Recipe(**options))


@pytest.fixture(scope="module")
def statistics_file(
    repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function of a family: statistics of random inputs of every matrix."""

    def saved(name: str) -> Path:
        torch.manual_seed(0)
        layers = {}
        with open_quantized(repository(name)) as quantized:
            for tensor, spec in quantized.checkpoint.items():
                if len(spec.shape) == 2:
                    recorder = InputRecorder()
                    recorder.record(observe(torch.randn(8, spec.shape[1])), step=0)
                    layers[f".{tensor.removesuffix('.weight')}"] = recorder.statistics()
            identity = recording_identity([], {}, {"": quantized.checkpoint.fingerprint()})
        path = tmp_path_factory.mktemp(name) / "statistics.safetensors"
        Statistics(identity, {key: found for key, found in layers.items() if found is not None}).save(path)
        return path

    return saved


@pytest.mark.parametrize(
    ("options", "algorithm"),
    [({}, None), ({"dialect": "modelopt"}, "FP8"), ({"method": "nvfp4"}, "NVFP4")],
)
@pytest.mark.parametrize("name", NAMES)
def test_static_activations_have_one_scale_for_each_layer_of_the_runtime(
    name: str,
    options: dict[str, Any],
    algorithm: str | None,
    repository: Callable[[str], Path],
    statistics_file: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    convert_checkpoint(repository(name), tmp_path / "out", Recipe(calibration=(statistics_file(name),), **options))
    block, tensors = block_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert block.get("quant_algo") == algorithm
    assert block.get("activation_scheme", "static") == "static"
    with open_quantized(tmp_path / "out") as quantized:
        family = family_of(tmp_path / "out")
        groups = family.layer_groups(dequantized_view(quantized), "vllm-omni", {"fp8"})
        layers = {*quantized.layers}
    overall = "weight_scale" if options.get("method") is None else "weight_scale_2"
    for group in groups:
        stored = [stem for stem in group.members if stem in layers]
        for suffix in (overall, "input_scale") if stored else ():
            scales = [tensors[f"{stem}.{suffix}"] for stem in stored]
            assert all(scale.numel() == 1 and scale > 0 for scale in scales)
            assert len({float(scale) for scale in scales}) == 1, group.runtime_name
    assert findings(tmp_path / "out") == set()
    assert outcome(tmp_path / "out") == "loads"


@pytest.mark.parametrize("name", NAMES)
def test_calibrating_needs_a_class_of_transformers(
    name: str, repository: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    with pytest.raises(CalibrationError, match=NO_CLASS):
        record_source(resolve_source(repository(name)), Recipe(calib=tmp_path / "prompts.txt"))
    with pytest.raises(CalibrationError, match=NO_CLASS):
        convert_checkpoint(repository(name), tmp_path / "out", Recipe(calib=tmp_path / "prompts.txt"))


@pytest.mark.parametrize("name", ["hunyuan_image_3", "bagel"])
def test_the_user_learns_with_which_deployment_the_result_runs(
    name: str, repository: Callable[[str], Path], tmp_path: Path
) -> None:
    report = convert_checkpoint(repository(name), tmp_path / "out", Recipe(method="mxfp8"))
    deployment = {"hunyuan_image_3": "hunyuan_image3_dit.yaml", "bagel": "bagel_single_stage.yaml"}[name]
    assert any(deployment in note for note in report.notes)
    assert any("the experts" in note for note in report.notes) == (name == "hunyuan_image_3")


@pytest.mark.parametrize("name", NAMES)
def test_a_repository_is_dequantized_to_one_without_a_block(
    name: str, converted: Callable[..., Path], repository: Callable[[str], Path], tmp_path: Path
) -> None:
    convert_checkpoint(converted(name), tmp_path / "plain", Recipe(method="dequantize"))
    plain, original = tensors_of(tmp_path / "plain"), tensors_of(repository(name))
    assert plain.keys() == original.keys()
    for key, weight in original.items():
        difference = (plain[key].float() - weight.float()).norm()
        assert difference <= 0.04 * weight.float().norm(), key
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == json.loads((repository(name) / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("hunyuan_image_3", "vision_model.encoder.layers.0.mlp.fc1"),
        ("hunyuan_image_3", "vision_aligner.layers.0"),
        ("hunyuan_image_3", "model.layers.0.mlp.gate.wg"),
        ("hunyuan_image_3", "time_embed.mlp.2"),
        ("hunyuan_image_3", "lm_head"),
        ("bagel", "vit_model.vision_model.encoder.layers.0.mlp.fc1"),
        ("bagel", "connector.fc1"),
        ("bagel", "vae2llm"),
        ("bagel", "language_model.lm_head"),
        ("hidream_o1", "model.visual.blocks.0.mlp.linear_fc1"),
        ("hidream_o1", "model.t_embedder1.mlp.2"),
        ("hidream_o1", "lm_head"),
    ],
)
def test_verify_finds_a_layer_that_the_runtime_does_not_load_quantized(
    name: str, stem: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(converted(name), tmp_path)
    store_as_fp8(folder, stem)
    assert {check for check, layer in findings(folder) if layer == stem} & {
        "not-built-quantized",
        "ignored-but-quantized",
    }
    assert outcome(folder) == "wrong"


@pytest.mark.parametrize("method", ["int8", "mxfp8"])
def test_verify_finds_experts_of_a_method_that_has_none_for_them(
    method: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(converted("hunyuan_image_3", method), tmp_path)
    stem = "model.layers.0.mlp.experts.0.down_proj"
    with open_quantized(folder) as quantized:
        layout = quantized.layers["model.layers.0.mlp.shared_mlp.down_proj"].tensors
        kinds = {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in layout.items()}
    replace_tensors(folder, stem, {suffix: torch.ones(shape).to(dtype) for suffix, (dtype, shape) in kinds.items()})
    assert ("not-built-quantized", stem) in findings(folder)


@pytest.mark.parametrize(
    ("name", "entry", "stem"),
    [
        ("hunyuan_image_3", "layers.1.mlp.gate", "model.layers.1.mlp.gate.wg"),
        ("bagel", "bagel.connector.fc1", "connector.fc1"),
    ],
)
def test_verify_finds_a_layer_that_is_not_ignored_under_the_name_of_the_runtime(
    name: str, entry: str, stem: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(converted(name), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignored_layers"].remove(entry)
    (folder / "config.json").write_text(json.dumps(config))
    assert {layer for _, layer in findings(folder)} == {stem}


def test_verify_finds_a_scale_for_each_row_of_merged_heads(converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied(converted("hunyuan_image_3"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
        "ignore": [f"layers.{number}.mlp.gate" for number in range(2)],
    }
    (folder / "config.json").write_text(json.dumps(config))
    with open_quantized(converted("hunyuan_image_3")) as quantized:
        shapes = {stem: layer.shape for stem, layer in quantized.layers.items()}
    for stem, (rows, _) in shapes.items():
        replace_tensors(folder, stem, {"weight_scale": torch.ones(rows)})
    assert ("unsupported-family", "") in findings(folder)
    assert outcome(folder) == "wrong"


def copied(folder: Path, tmp_path: Path) -> Path:
    """A conversion to spoil, without the manifest that would show that it was."""
    shutil.copytree(folder, tmp_path / "wrong")
    (tmp_path / "wrong" / "omni_convert.json").unlink()
    return tmp_path / "wrong"


def store_as_fp8(folder: Path, stem: str) -> None:
    """Stores a layer of a finished conversion as FP8, as converters do that do not know the model."""
    weight = tensors_of(folder)[f"{stem}.weight"].float()
    scale = weight.abs().amax() / 448
    replace_tensors(folder, stem, {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale})


def replace_tensors(folder: Path, stem: str, tensors: dict[str, torch.Tensor]) -> None:
    """Puts tensors of a layer into the file that holds its weight, and into the index if there is one."""
    added = {f"{stem}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    for path in folder.glob("model*.safetensors"):
        stored = load_file(path)
        if f"{stem}.weight" not in stored:
            continue
        save_file(stored | added, path, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            content["weight_map"] |= dict.fromkeys(added, path.name)
            index.write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "method"), [(name, "fp8") for name in NAMES])
def test_every_layer_of_the_table_is_in_a_model(name: str, method: str, repository: Callable[[str], Path]) -> None:
    family = family_of(repository(name))
    with open_quantized(repository(name)) as quantized:
        groups = family.layer_groups(quantized.checkpoint, "vllm-omni", {method})
    numbers = re.compile(r"(?<=\.)(\d+|{})(?=\.|$)")
    assert {numbers.sub("N", group.runtime_name) for group in groups} == {
        numbers.sub("N", pattern.runtime_name) for pattern in family.layers
    }


def test_hidream_o1_is_told_from_qwen3_vl_by_a_tensor_of_the_index(
    repository: Callable[[str], Path], tmp_path: Path
) -> None:
    convert_checkpoint(repository("hidream_o1"), tmp_path / "out", Recipe())  # all would fit into one file
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.final_layer2.linear.weight" in index["weight_map"]
    plain = tmp_path / "qwen"
    shutil.copytree(repository("hidream_o1"), plain)
    (plain / "model.safetensors.index.json").unlink()
    (plain / "model-00002-of-00002.safetensors").unlink()
    (plain / "model-00001-of-00002.safetensors").rename(plain / "model.safetensors")
    assert ComponentFolder(resolve_source(plain), "").stage is None
    with pytest.raises(RecipeError, match="'Qwen3VLForConditionalGeneration' is not known here"):
        convert_checkpoint(plain, tmp_path / "no", Recipe())


def test_the_files_of_bagel_on_the_hub_are_needed() -> None:
    files = {"config.json", "llm_config.json", "ema.safetensors", "ae.safetensors", "merges.txt"}
    assert needed_files("owner/name", files | {".gitattributes", "ema.bin"}) == files


@pytest.mark.parametrize(("name", "count"), [("omnigen_2", 35), ("ming_image", 28)])
def test_a_pipeline_that_diffusers_has_no_class_for_is_for_vllm_omni_alone(
    name: str, count: int, tmp_path: Path
) -> None:
    tiny_models.save_model(name, tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", Recipe())
    assert findings(tmp_path / "out") == set()
    (component,) = inspect_source(resolve_source(tmp_path / "out"))
    assert len(component.layers) == count
    outcomes = {verdict.runtime: verdict.outcome for verdict in component.runtimes}
    assert outcomes["vLLM-Omni 0.30"] == "loads"
    assert outcomes["omni_convert.loaders"] == outcomes["diffusers 0.42"] == "refuses"
    with pytest.raises(RecipeError, match=r"diffusers 0\.42 has no class for this model$"):
        convert_checkpoint(tmp_path / "source", tmp_path / "ours", Recipe(runtime="diffusers"))
