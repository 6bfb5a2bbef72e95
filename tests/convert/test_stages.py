"""Repositories of transformers with stages: one language model is quantized, all else is taken over byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_stages
import torch
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.hub_selection import needed_files
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.families.table import find_family

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about token ids beyond a tiny vocabulary

#: Family → prefix of its quantized blocks, and the names of their layers.
LAYERS = {
    "qwen_3_omni": {
        "thinker.model.layers.N.self_attn.q_proj",
        "thinker.model.layers.N.self_attn.k_proj",
        "thinker.model.layers.N.self_attn.v_proj",
        "thinker.model.layers.N.self_attn.o_proj",
        "thinker.model.layers.N.mlp.experts.N.gate_proj",
        "thinker.model.layers.N.mlp.experts.N.up_proj",
        "thinker.model.layers.N.mlp.experts.N.down_proj",
    },
    "qwen_2_5_omni": {
        *(f"thinker.model.layers.N.self_attn.{leaf}_proj" for leaf in "qkvo"),
        *(f"thinker.model.layers.N.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    },
    "qwen_3_tts": {
        *(f"talker.model.layers.N.self_attn.{leaf}_proj" for leaf in "qkvo"),
        *(f"talker.model.layers.N.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    },
}
IGNORED = {
    "qwen_3_omni": ["*mlp.gate", "lm_head"],
    "qwen_2_5_omni": ["lm_head", "*visual*"],
    "qwen_3_tts": ["lm_head"],
}
IN_THINKER = ("thinker_config", "text_config", "quantization_config")
PLACES = {"qwen_3_omni": IN_THINKER, "qwen_2_5_omni": IN_THINKER, "qwen_3_tts": ("quantization_config",)}


@pytest.fixture(scope="module")
def converted(repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function of a family: its repository as weight-only NVFP4, read-only."""
    folder = tmp_path_factory.mktemp("converted")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            convert_checkpoint(repository(name), folder / name, Recipe(method="nvfp4", max_shard_size="300KB"))
        return folder / name

    return made


def block_at(folder: Path, place: tuple[str, ...]) -> Any:
    part = json.loads((folder / "config.json").read_text())
    for key in place:
        part = part.get(key, {})
    return part


def findings(folder: Path) -> set[tuple[str, str]]:
    """Check and layer of every error."""
    (component,) = verify_source(resolve_source(folder))
    return {(finding.check, finding.layer) for finding in component.findings if finding.severity == "error"}


def outcome(folder: Path) -> str:
    """What `inspect` says that vLLM-Omni does."""
    (component,) = inspect_source(resolve_source(folder))
    return component.runtimes[0].outcome


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_language_model_of_one_stage_is_quantized(name: str, converted: Callable[[str], Path]) -> None:
    with open_quantized(converted(name)) as quantized:
        assert {re.sub(r"\d+", "N", stem) for stem in quantized.layers} == LAYERS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_all_other_tensors_and_files_keep_their_bytes(
    name: str, repository: Callable[[str], Path], converted: Callable[[str], Path]
) -> None:
    source, result = repository(name), converted(name)
    before = {key: value for file in source.glob("*.safetensors") for key, value in load_file(file).items()}
    after = {key: value for file in result.glob("*.safetensors") for key, value in load_file(file).items()}
    with open_quantized(result) as quantized:
        kept = {key for key in before if key.removesuffix(".weight") not in quantized.layers}
    assert kept < before.keys()
    for key in kept:
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    for file in tiny_stages.OTHER_FILES:
        assert (result / file).read_bytes() == (source / file).read_bytes()
    shards = sorted(file.name for file in result.glob("*.safetensors"))
    assert all(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", shard) for shard in shards)


@pytest.mark.parametrize("name", LAYERS)
def test_the_block_stands_where_only_the_stage_finds_it(name: str, converted: Callable[[str], Path]) -> None:
    block = block_at(converted(name), PLACES[name])
    assert (block["quant_method"], block["quant_algo"]) == ("modelopt", "NVFP4")
    assert block["ignore"] == IGNORED[name]
    if PLACES[name] == IN_THINKER:
        assert block_at(converted(name), ("quantization_config",)) == {}
        assert block_at(converted(name), ("talker_config", "text_config", "quantization_config")) == {}
        for_all_stages = json.loads((converted(name) / "hf_quant_config.json").read_text())
        assert for_all_stages == {**block, "ignore": [*block["ignore"], "talker*"]}
    else:
        assert not (converted(name) / "hf_quant_config.json").exists()


@pytest.mark.parametrize("name", LAYERS)
def test_verify_and_inspect_agree_that_nothing_is_wrong(name: str, converted: Callable[[str], Path]) -> None:
    assert findings(converted(name)) == set()
    assert outcome(converted(name)) == "loads"


@pytest.mark.parametrize("name", LAYERS)
def test_a_repository_is_dequantized_to_one_without_blocks(
    name: str, converted: Callable[[str], Path], repository: Callable[[str], Path], tmp_path: Path
) -> None:
    convert_checkpoint(converted(name), tmp_path / "plain", Recipe(method="dequantize"))
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads(
        (repository(name) / "config.json").read_text()
    )
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    with open_quantized(tmp_path / "plain") as quantized:
        assert not quantized.layers


def test_an_expert_that_is_ignored_keeps_the_stack_that_the_runtime_builds_as_one(
    repository: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = Recipe(method="nvfp4", ignored_layers=("thinker.model.layers.1.mlp.experts.2.up_proj",))
    convert_checkpoint(repository("qwen_3_omni"), tmp_path / "out", recipe)
    with open_quantized(tmp_path / "out") as quantized:
        assert not any("layers.1.mlp" in stem for stem in quantized.layers)
        assert any("layers.0.mlp" in stem for stem in quantized.layers)
    ignored = block_at(tmp_path / "out", IN_THINKER)["ignore"]
    assert ignored == ["*mlp.gate", "lm_head", "*model.layers.1.mlp.experts"]
    assert findings(tmp_path / "out") == set()


def test_ignored_layers_are_listed_as_the_runtime_merges_them(
    repository: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = Recipe(method="nvfp4", ignored_layers=("talker.model.layers.0.self_attn.q_proj",))
    convert_checkpoint(repository("qwen_3_tts"), tmp_path / "out", recipe)
    attention = "*model.layers.0.self_attn"
    assert block_at(tmp_path / "out", ("quantization_config",))["ignore"] == [
        "lm_head",
        *(f"{attention}.{leaf}" for leaf in ("k_proj", "q_proj", "qkv_proj", "v_proj")),
    ]
    assert findings(tmp_path / "out") == set()


def test_w4a16_has_its_block_at_the_top_level_and_names_its_blocks(
    repository: Callable[[str], Path], tmp_path: Path
) -> None:
    convert_checkpoint(repository("qwen_3_omni"), tmp_path / "out", Recipe(method="w4a16", group_size=32))
    block = block_at(tmp_path / "out", ("quantization_config",))
    # VLLM-Omni 0.30.0 looks layers up by the second name, since its parser keeps the names that were not mapped.
    assert block["block_name_to_quantize"] == "thinker.model.layers,thinker.language_model.model.layers"
    routers = {f"thinker.model.layers.{number}.mlp.gate" for number in range(2)}
    assert block["extra_config"].keys() == {*routers, "thinker.lm_head"}
    assert block_at(tmp_path / "out", IN_THINKER) == {}
    assert findings(tmp_path / "out") == set()
    assert outcome(tmp_path / "out") == "loads"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["extra_config"]["thinker.lm_head"]  # outside of the blocks, as AutoRound has it
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "omni_convert.json").unlink()
    assert findings(tmp_path / "out") == set()


@pytest.mark.parametrize("method", ["int8", "mxfp8", "mxfp4", "mxfp4_dualscale"])
@pytest.mark.parametrize("name", LAYERS)
def test_methods_that_a_stage_does_not_load_are_refused(
    name: str, method: str, repository: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"no method that loads this one; fp8, nvfp4 and w4a16 are there$"):
        convert_checkpoint(repository(name), tmp_path / "out", Recipe(method=method))


@pytest.mark.parametrize("options", [{"runtime": "diffusers"}, {"dialect": "comfyui"}])
def test_other_runtimes_are_refused(options: dict[str, str], repository: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a repository of transformers, which vLLM-Omni alone runs quantized$"):
        convert_checkpoint(repository("qwen_3_omni"), tmp_path / "out", Recipe(**options))


def test_fp8_of_experts_without_statistics_is_refused(repository: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="static activations alone; add --calib"):
        convert_checkpoint(repository("qwen_3_omni"), tmp_path / "out", Recipe())


@pytest.mark.parametrize("name", ["qwen_2_5_omni", "qwen_3_tts"])
def test_fp8_of_dense_layers_without_statistics_has_dynamic_activations(
    name: str, repository: Callable[[str], Path], tmp_path: Path
) -> None:
    convert_checkpoint(repository(name), tmp_path / "out", Recipe())
    assert block_at(tmp_path / "out", PLACES[name])["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    with open_quantized(tmp_path / "out") as quantized:
        assert {layer.format.label for layer in quantized.layers.values()} == {"fp8 per row"}
        assert not any(key.endswith("input_scale") for key in quantized.checkpoint)
    assert findings(tmp_path / "out") == set()


@pytest.mark.parametrize(
    "stem",
    [
        "thinker.audio_tower.layers.0.fc1",
        "thinker.visual.blocks.0.mlp.linear_fc1",
        "talker.model.layers.0.self_attn.o_proj",
        "talker.text_projection.linear_fc1",
        "thinker.model.layers.0.mlp.gate",
        "thinker.lm_head",
    ],
)
def test_verify_finds_a_layer_that_the_stage_does_not_load_quantized(
    stem: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(converted("qwen_3_omni"), folder)
    quantize_to_nvfp4(folder, stem)
    assert {check for check, layer in findings(folder) if layer == stem} & {
        "not-built-quantized",
        "ignored-but-quantized",
    }
    assert outcome(folder) == "wrong"


def quantize_to_nvfp4(folder: Path, stem: str) -> None:
    """Stores a layer of a finished conversion as NVFP4, as converters do that do not know the stages."""
    from omni_convert.formats.schemes.nvfp4 import Nvfp4

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][f"{stem}.weight"]
    tensors = load_file(path)
    weight = tensors.pop(f"{stem}.weight")
    fmt = Nvfp4()
    rows, columns = weight.shape
    layout = fmt.layout(rows, columns)
    scale = torch.tensor(float(weight.float().abs().amax()) / (448 * 6))
    zeros = {suffix: torch.zeros(each.shape, dtype=each.dtype) for suffix, each in layout.items()}
    added = {**zeros, "weight_scale_2": scale, "weight_scale": torch.ones(layout["weight_scale"].shape)}
    for suffix, tensor in added.items():
        tensors[f"{stem}.{suffix}"] = tensor.to(layout[suffix].dtype)
        index["weight_map"][f"{stem}.{suffix}"] = path.name
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "omni_convert.json").unlink(missing_ok=True)


def test_verify_finds_a_block_at_the_top_level(converted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(converted("qwen_3_omni"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config["thinker_config"]["text_config"].pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "omni_convert.json").unlink()
    assert ("misplaced-block", "") in findings(folder)
    assert outcome(folder) == "wrong"


def test_verify_finds_a_router_that_is_not_ignored(converted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(converted("qwen_3_omni"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["thinker_config"]["text_config"]["quantization_config"]["ignore"].remove("*mlp.gate")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "omni_convert.json").unlink()
    routers = {("not-ignored", f"thinker.model.layers.{number}.mlp.gate") for number in range(2)}
    assert findings(folder) == routers


def test_every_layer_of_the_table_is_in_a_model(repository: Callable[[str], Path]) -> None:
    unmatched = set()
    for name in LAYERS:
        config = json.loads((repository(name) / "config.json").read_text())
        family = find_family(config["architectures"][0])
        with open_quantized(repository(name)) as quantized:
            found = {
                re.sub(r"\d+", "{}", group.runtime_name)
                for group in family.layer_groups(quantized.checkpoint, "vllm-omni")
            }
        unmatched |= {(name, pattern.runtime_name) for pattern in family.layers} - {(name, each) for each in found}
    dense = {("qwen_3_omni", f"thinker.model.layers.{{}}.mlp.{leaf}_proj") for leaf in ("gate_up", "down")}
    assert unmatched == dense  # of Qwen3-Omni's models without experts in some blocks


def test_all_files_of_a_repository_on_the_hub_are_needed_but_weights_of_other_kinds() -> None:
    kept = {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "merges.txt",
        "spk_dict.pt",
        "modeling_custom.py",
        "speech_tokenizer/model.safetensors",
        "speech_tokenizer/config.json",
    }
    assert needed_files("owner/name", kept | {"pytorch_model.bin", ".gitattributes", "model.gguf"}) == kept


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red circle on a blue background\nHello!\n")
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize("name", ["qwen_3_omni", "qwen_2_5_omni"])
def test_calibrated_fp8_has_a_scalar_input_scale_for_each_layer(
    name: str, repository: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    convert_checkpoint(repository(name), tmp_path / "out", Recipe(calib=prompts))
    assert block_at(tmp_path / "out", IN_THINKER)["quant_algo"] == "FP8"
    with open_quantized(tmp_path / "out") as quantized:
        assert {re.sub(r"\d+", "N", stem) for stem in quantized.layers} == LAYERS[name]
        for layer in quantized.layers.values():
            assert layer.format.label == "fp8 static"
            for suffix in ("weight_scale", "input_scale"):
                scale = layer.read_tensor(suffix, 0, 0)
                assert scale.shape == ()
                assert scale > 0
    assert findings(tmp_path / "out") == set()
    assert outcome(tmp_path / "out") == "loads"


@pytest.mark.parametrize("name", ["qwen_3_omni", "qwen_2_5_omni"])
def test_a_streamed_stage_gives_the_same_statistics(
    name: str, repository: Callable[[str], Path], prompts: Path
) -> None:
    source = resolve_source(repository(name))
    full, streamed = (
        record_source(source, Recipe(calib=prompts, device="cpu", memory=memory), progress=False).statistics
        for memory in ("full", "stream")
    )
    assert full.layers
    assert full.fingerprint() == streamed.fingerprint()


def test_recorded_inputs_are_those_that_transformers_computes(repository: Callable[[str], Path], prompts: Path) -> None:
    recipe = Recipe(calib=prompts)
    statistics = record_source(resolve_source(repository("qwen_3_omni")), recipe, progress=False).statistics
    amax = inputs_of_transformers(repository("qwen_3_omni"), prompts.read_text().splitlines())
    recorded = {name.removeprefix("."): layer.amax() for name, layer in statistics.layers.items()}
    assert amax.keys() <= recorded.keys()
    for stem, value in amax.items():
        assert recorded[stem] == pytest.approx(value, rel=1e-2), stem


def inputs_of_transformers(folder: Path, texts: list[str]) -> dict[str, float]:
    """Largest input of layers of the second block, from transformers' own modules and their stacked experts."""
    import transformers

    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder, dtype="auto")
    model = model.get_decoder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[str, float] = {}
    block = model.layers[1]

    def note(stem: str, values: torch.Tensor) -> None:
        found[stem] = max(found.get(stem, 0.0), float(values.abs().max()))

    def attention(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        note("thinker.model.layers.1.self_attn.o_proj", args[0])

    def experts(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        states, index = args[0], args[1]
        for number in index.unique().tolist():
            rows = states[(index == number).any(dim=-1)]
            stem = f"thinker.model.layers.1.mlp.experts.{number}"
            gate, up = torch.nn.functional.linear(rows, module.gate_up_proj[number]).chunk(2, dim=-1)
            note(f"{stem}.gate_proj", rows)
            note(f"{stem}.up_proj", rows)
            note(f"{stem}.down_proj", torch.nn.functional.silu(gate) * up)

    block.self_attn.o_proj.register_forward_pre_hook(attention)
    block.mlp.experts.register_forward_pre_hook(experts)
    with torch.no_grad():
        for text in texts:
            model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
    return found


def test_an_expert_that_no_token_reached_gets_the_scale_of_the_others_of_its_layer(
    repository: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("r\n")  # one token, which reaches two of the four experts of each block
    recipe = Recipe(calib=tmp_path / "prompts.txt")
    report = convert_checkpoint(repository("qwen_3_omni"), tmp_path / "out", recipe)
    (note,) = [note for note in report.notes if note.startswith("no token reached thinker.model.layers.0.mlp.experts.")]
    assert note.endswith("the inputs of the other experts of their layers set the scales")
    statistics = record_source(resolve_source(repository("qwen_3_omni")), recipe, progress=False).statistics
    with open_quantized(tmp_path / "out") as quantized:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            stems = [f"thinker.model.layers.1.mlp.experts.{number}.{leaf}" for number in range(4)]
            scales = {stem: float(quantized.layers[stem].read_tensor("input_scale", 0, 0)) for stem in stems}
            reached = [stem for stem in stems if f".{stem}" in statistics.layers]
            assert len(reached) == 2
            largest = max(scales[stem] for stem in reached)
            assert all(scales[stem] == largest for stem in {*stems} - {*reached})


def test_a_model_without_a_class_in_transformers_is_not_calibrated(
    repository: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"found Qwen3-TTS, for which neither diffusers nor transformers"):
        convert_checkpoint(repository("qwen_3_tts"), tmp_path / "out", Recipe(calib=prompts))
