"""Conversion of a real (tiny) Z-Image pipeline: what is on the disk afterwards, and what is not when all goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.calibration import pipeline_recorder
from omni_convert.convert.conversion import Conversion
from omni_convert.convert.execution.component_result import LayerResult
from omni_convert.convert.plan.plan import plan_conversion
from omni_convert.convert.report import ConversionReport, conversion_report
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CalibrationError, CheckpointError, OmniConvertError, OutputError, RecipeError
from omni_convert.formats.table import layer_formats

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def block_of(output: Path, component: str = "transformer") -> dict[str, Any]:
    return dict(json.loads((output / component / "config.json").read_text())["quantization_config"])


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def statistics_file(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from omni_convert.convert.calibration.recording import record_source
    from omni_convert.convert.source.location import resolve_source

    folder = tmp_path_factory.mktemp("statistics")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    recipe = Recipe(calib=folder / "prompts.txt", calib_steps=2, calib_size=(32, 32))
    record_source(resolve_source(tiny_pipeline_folder), recipe).statistics.save(folder / "stats.safetensors")
    return folder / "stats.safetensors"


def test_fp8_block_and_tensors(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="fp8"))
    block = block_of(tmp_path / "out")
    assert block.pop("ignored_layers")[0] == "lm_head"
    assert block == {"quant_method": "fp8", "activation_scheme": "dynamic", "is_checkpoint_fp8_serialized": True}
    tensors = tensors_of(tmp_path / "out" / "transformer")
    assert tensors["layers.0.attention.to_q.weight"].dtype == torch.float8_e4m3fn
    assert tensors["layers.0.attention.to_q.weight_scale"].dtype == torch.float32
    assert tensors["layers.0.attention.to_q.weight_scale"].shape == ()


def test_weights_out_of_range_are_not_blamed_on_a_lora_that_is_not_there() -> None:
    layer = LayerResult("transformer.layers.0", "fp8", 2, 1, 1.0)
    report = ConversionReport(Path("out"), (layer,), (), (), 2, 1, 1.0, None, None)
    (warning,) = report.warnings
    assert "far from others that share their scale; --ignored-layers" in warning
    assert "is the LoRA's SCALE too large?" in replace(report, has_lora=True).warnings[0]


def test_a_conversion_that_is_resumed_runs_no_prompt_again(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    recipe = Recipe(calib=tmp_path / "prompts.txt", calib_steps=2, calib_size=(32, 32))
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "whole", recipe)
    Conversion.prepare(tiny_pipeline_folder, tmp_path / "out", recipe).calibrate()  # and then it is interrupted
    assert (tmp_path / "out.partial.statistics").is_file()
    monkeypatch.setattr(pipeline_recorder, "run_prompts", None)
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", replace(recipe, resume=True))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt", "whole"]


def test_fused_members_share_one_scale(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="fp8"))
    tensors = tensors_of(tmp_path / "out" / "transformer")
    for members in (("attention.to_q", "attention.to_k", "attention.to_v"), ("feed_forward.w1", "feed_forward.w3")):
        assert len({tensors[f"layers.0.{member}.weight_scale"].item() for member in members}) == 1


def test_block_wise_fp8(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="fp8", weight_block_size=(32, 32)))
    assert block_of(tmp_path / "out")["weight_block_size"] == [32, 32]
    tensors = tensors_of(tmp_path / "out" / "transformer")
    rows, columns = tensors["layers.0.feed_forward.w1.weight"].shape
    assert tensors["layers.0.feed_forward.w1.weight_scale_inv"].shape == (-(-rows // 32), -(-columns // 32))


def test_int8_shares_a_constant_column_in_fused_groups_only(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="int8"))
    tensors = tensors_of(tmp_path / "out" / "transformer")
    assert tensors["layers.0.attention.to_q.weight_scale"].unique().numel() == 1
    assert tensors["layers.0.attention.to_out.0.weight_scale"].unique().numel() > 1
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "ascend", Recipe(method="int8", int8_fused_scales="per-row"))
    per_row = tensors_of(tmp_path / "ascend" / "transformer")
    assert per_row["layers.0.attention.to_q.weight_scale"].unique().numel() > 1


def test_static_fp8_stores_the_calibrated_input_scale(
    tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    from omni_convert.formats.statistics.statistics import Statistics

    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(calibration=(statistics_file,)))
    assert block_of(tmp_path / "out")["activation_scheme"] == "static"
    tensors = tensors_of(tmp_path / "out" / "transformer")
    group = ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3")
    inputs = Statistics.load(statistics_file).for_group("transformer", group)
    assert inputs is not None
    for member in group:
        assert tensors[f"{member}.input_scale"].item() == pytest.approx(inputs.amax() / 448, rel=1e-6)


def test_what_is_not_quantized_keeps_its_bytes(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out")
    before, after = digests(tiny_pipeline_folder), digests(tmp_path / "out")
    rewritten = {name for name in before if after.get(name) != before[name]}
    assert rewritten == {"transformer/config.json", f"transformer/{WEIGHTS}"}
    source, output = (tensors_of(folder / "transformer") for folder in (tiny_pipeline_folder, tmp_path / "out"))
    quantized = {f"{stem}.weight" for stem in manifest_of(tmp_path / "out")["components"]["transformer"]["layers"]}
    assert quantized < source.keys()
    for name in source.keys() - quantized:
        assert torch.equal(source[name], output[name])
        assert source[name].dtype == output[name].dtype


def manifest_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "omni_convert.json").read_text()))


def test_the_manifest_hashes_every_other_file_and_names_no_place(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out")
    after = digests(tmp_path / "out")
    after.pop("omni_convert.json")
    assert manifest_of(tmp_path / "out")["files"] == after
    assert str(tmp_path) not in (tmp_path / "out" / "omni_convert.json").read_text()


def test_the_model_card_has_metadata_that_the_hub_accepts(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.library_name == "diffusers"
    assert "fp8" in card.data.tags


def test_two_runs_give_the_same_bytes(tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / name / "out", Recipe(calibration=(statistics_file,)))
    assert digests(tmp_path / "first" / "out") == digests(tmp_path / "second" / "out")


def test_calibrating_gives_the_same_bytes_as_its_statistics_file(
    tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> Checkpoint:
        pytest.fail(f"{path} is opened again")

    live = Recipe(calib=statistics_file.with_name("prompts.txt"), calib_steps=2, calib_size=(32, 32))
    conversion = Conversion.prepare(tiny_pipeline_folder, tmp_path / "live" / "out", live)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "open", refuse)  # the plan has opened them already
        conversion.calibrate()
    conversion.execute(lambda _: None)
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "file" / "out", Recipe(calibration=(statistics_file,)))
    assert digests(tmp_path / "live" / "out") == digests(tmp_path / "file" / "out")


def test_the_report_tells_what_calibration_took_apart(
    tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    live = Recipe(calib=statistics_file.with_name("prompts.txt"), calib_steps=2, calib_size=(32, 32))
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "live", live)
    assert report.calibration_seconds
    assert f"time to calibrate {report.calibration_seconds:.1f} s" in conversion_report(report, as_json=False)
    (document,) = conversion_report(report, as_json=True)
    assert json.loads(document)["calibration_seconds"] == report.calibration_seconds
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "file", Recipe(calibration=(statistics_file,)))
    assert report.calibration_seconds is None
    assert not any("calibrate" in line for line in conversion_report(report, as_json=False))


def test_shards_and_index_are_those_of_diffusers(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(max_shard_size="100KB"))
    folder = tmp_path / "out" / "transformer"
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, "pt") as shard:
            assert {name for name, where in index["weight_map"].items() if where == file} == set(shard.keys())
            assert shard.metadata() == {"format": "pt"}


def test_sharded_and_single_file_sources_give_the_same_tensors(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    from diffusers import ZImageTransformer2DModel

    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_pipeline_folder, sharded)
    shutil.rmtree(sharded / "transformer")
    model = ZImageTransformer2DModel.from_pretrained(tiny_pipeline_folder / "transformer", torch_dtype=torch.bfloat16)
    model.save_pretrained(sharded / "transformer", max_shard_size="100KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    convert_checkpoint(sharded, tmp_path / "a")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "b")
    first, second = tensors_of(tmp_path / "a" / "transformer"), tensors_of(tmp_path / "b" / "transformer")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert bytes_of(tensor) == bytes_of(second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_source_dtypes(tiny_pipeline_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = tmp_path / "transformer"
    shutil.copytree(tiny_pipeline_folder / "transformer", source)
    save_file({name: tensor.to(dtype) for name, tensor in load_file(source / WEIGHTS).items()}, source / WEIGHTS)
    report = convert_checkpoint(source, tmp_path / "out", Recipe(method="int8"))
    assert report.median_error < 0.02
    assert tensors_of(tmp_path / "out")["x_pad_token"].dtype == dtype


def test_a_single_file_gives_config_and_shards_beside_each_other(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder / "transformer" / WEIGHTS, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        WEIGHTS,
        "omni_convert.json",
        "README.md",
    }


def test_an_ignored_member_keeps_its_whole_group_and_lists_it(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(ignored_layers=("layers.0.attention.to_k", "w2"))
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    ignored = set(block_of(tmp_path / "out")["ignored_layers"])
    assert {"layers.0.attention.to_qkv", "layers.0.attention.to_q", "layers.0.attention.to_v"} <= ignored
    assert "layers.1.feed_forward.w2" in ignored
    tensors = tensors_of(tmp_path / "out" / "transformer")
    assert tensors["layers.0.attention.to_q.weight"].dtype == torch.bfloat16
    assert "layers.0.attention.to_q.weight_scale" not in tensors
    assert "ignored by 'w2'" in {layer.reason for layer in report.kept}


def test_the_text_encoder_is_ignored_in_the_shared_block_or_quantized_with_it(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "plain")
    assert "model.layers.0.self_attn.q_proj" in block_of(tmp_path / "plain")["ignored_layers"]
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "both", Recipe(component={"text_encoder": "fp8"}))
    assert "model.layers.0.self_attn.q_proj" not in block_of(tmp_path / "both").get("ignored_layers", [])
    assert block_of(tmp_path / "both", "text_encoder")["quant_method"] == "omni_convert"
    with safe_open(tmp_path / "both" / "text_encoder" / "model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.q_proj.weight_scale" in file.keys()  # noqa: SIM118 - a reader, not a dict


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit_config(source: Path, **changes: Any) -> None:
    path = source / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poison(source: Path, name: str, value: float) -> None:
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})


def check_refused(error: type[OmniConvertError], message: str, source: Path, output: Path, recipe: Recipe) -> None:
    with pytest.raises(error, match=message) as caught:
        convert_checkpoint(source, output, recipe)
    assert "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_a_weight_that_is_not_finite_is_named(
    tiny_pipeline_folder: Path, tmp_path: Path, value: float, method: str
) -> None:
    source = copy_of(tiny_pipeline_folder, tmp_path / "source")
    poison(source, "layers.1.feed_forward.w3.weight", value)
    message = r"tensor 'layers\.1\.feed_forward\.w3\.weight': found NaN or Inf in rows"
    check_refused(CheckpointError, message, source, tmp_path / "out", Recipe(method=method))
    assert (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (Recipe(ignored_layers=("img_mpl",)), RecipeError, "'img_mpl' matches no layer"),
        (Recipe(ignored_layers=("atention",)), RecipeError, "did you mean 'attention'"),
        (Recipe(ignored_layers=("*",)), RecipeError, "nothing is left to quantize"),
        (Recipe(activation_scheme="static"), CalibrationError, "found no statistics; add --calib"),
        (Recipe(method="int8", activation_scheme="static"), RecipeError, "int8 quantizes activations at run time"),
        (Recipe(component={"transfomer": "fp8"}), RecipeError, "did you mean 'transformer'"),
        (Recipe(component={"transformer": "none"}), RecipeError, "no component to quantize"),
        (Recipe(component={"text_encoder": "int8"}), RecipeError, "use the same one for both"),
        (Recipe(calibration=(Path("/nonexistent/stats.safetensors"),)), OmniConvertError, "stats.safetensors"),
    ],
    ids=lambda value: value.method if isinstance(value, Recipe) else "",
)
def test_a_recipe_that_cannot_be_carried_out(
    tiny_pipeline_folder: Path, tmp_path: Path, recipe: Recipe, error: type[OmniConvertError], message: str
) -> None:
    check_refused(error, message, tiny_pipeline_folder, tmp_path / "out", recipe)


def test_static_with_blocks_is_dynamic_and_says_so(
    tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(weight_block_size=(32, 32), activation_scheme="static", calibration=(statistics_file,))
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    assert block_of(tmp_path / "out")["activation_scheme"] == "dynamic"
    assert any("activations are dynamic" in note for note in report.notes)


def test_statistics_of_another_model_are_refused(
    tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    other = copy_of(tiny_pipeline_folder, tmp_path / "other")
    poison(other, "layers.0.feed_forward.w1.weight", 0.5)
    poison(other, "layers.0.feed_forward.w1.weight", 0.25)
    file = other / "transformer" / WEIGHTS
    save_file({name: tensor * 1.25 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    recipe = Recipe(calibration=(statistics_file,))
    check_refused(CalibrationError, "the statistics belong to another model", other, tmp_path / "out", recipe)


def test_a_model_quantized_in_a_way_that_is_not_read_is_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_pipeline_folder, tmp_path / "source")
    edit_config(source, quantization_config={"quant_method": "bitsandbytes"})
    check_refused(CheckpointError, r"quantized already \('bitsandbytes'\)", source, tmp_path / "out", Recipe())


def test_a_pickle_checkpoint_is_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_pipeline_folder, tmp_path / "source")
    (source / "transformer" / WEIGHTS).rename(source / "transformer" / "diffusion_pytorch_model.bin")
    check_refused(CheckpointError, "pickle|safetensors", source, tmp_path / "out", Recipe())


def test_truncated_and_missing_weights(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_pipeline_folder, tmp_path / "source")
    file = source / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    check_refused(CheckpointError, WEIGHTS, source, tmp_path / "out", Recipe())
    file.unlink()
    check_refused(CheckpointError, "transformer", source, tmp_path / "out", Recipe())


def test_an_output_that_is_not_empty_is_refused_before_any_work(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        convert_checkpoint(tiny_pipeline_folder, output)
    assert [path.name for path in output.iterdir()] == ["precious"]


@pytest.mark.parametrize("architectures", [[], [7], {"a": 1}, 7, None], ids=str)
def test_a_config_that_names_no_class_is_of_the_generic_family(
    tiny_pipeline_folder: Path, tmp_path: Path, architectures: object
) -> None:
    source = copy_of(tiny_pipeline_folder, tmp_path / "source")
    edit_config(source, _class_name=None, architectures=architectures)
    with pytest.raises(RecipeError, match="is not known here"):
        plan_conversion(resolve_source(source / "transformer"), Recipe())
    (component,) = plan_conversion(resolve_source(source / "transformer"), Recipe(runtime="diffusers")).components
    assert "layers.0.attention.to_q" in component.quantized_stems


def test_a_model_that_is_quantized_by_a_stranger_is_one_line(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_pipeline_folder, tmp_path / "source")
    edit_config(source, quantization_config={"quant_method": "x\n" * 1000})
    with pytest.raises(CheckpointError) as caught:
        plan_conversion(resolve_source(source), Recipe())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(source)) + 300


def test_files_that_links_bring_in_from_elsewhere_are_not_copied(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_pipeline_folder, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "vae" / "notes.txt").symlink_to(tmp_path / "secret")
    check_refused(CheckpointError, "found a link that leaves the folder", source, tmp_path / "out", Recipe())


def test_written_layers_are_recognized_by_their_tensors(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    from omni_convert.formats.containers.checkpoint import Checkpoint

    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out")
    formats = layer_formats(Checkpoint.open(tmp_path / "out" / "transformer"))
    assert {f"transformer.{stem}" for stem in formats} == {layer.name for layer in report.layers}
