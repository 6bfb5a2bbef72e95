"""Quantized models as input: re-encoded without a change, dequantized, quantized again; or refused, with a name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.writer import bytes_of
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.errors import CheckpointError, OmniConvertError, OutputError, RecipeError
from omni_convert.formats.schemes.int8 import Int8

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "layers.0.attention.to_q"
# The layer of ComfyUI that holds it.
JOINED = "layers.0.attention.qkv"

#: The conversions of the tiny model that each dialect can hold.
HELD = {
    "modelopt": ("fp8", "mxfp8", "nvfp4"),
    "comfyui": ("fp8", "int8", "mxfp8", "nvfp4"),
    "compressed-tensors": ("fp8", "fp8 blocks", "int8", "mxfp8", "mxfp4", "nvfp4"),
    "transformers": ("fp8 blocks", "mxfp8"),
    "msmodelslim": ("int8", "mxfp8", "mxfp4"),
    "auto-round": ("mxfp8", "mxfp4"),
}
CASES = [(dialect, method) for dialect, methods in HELD.items() for method in methods]


def recipe_for(method: str, **options: object) -> Recipe:
    blocks = {"weight_block_size": (64, 64)} if method == "fp8 blocks" else {}
    return Recipe(method=method.split()[0], search=False, **blocks, **options)  # type: ignore[arg-type]  # as typed there


@pytest.fixture(scope="session")
def quantized(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Method to the tiny pipeline quantized so, made once."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("quantized") / method.replace(" ", "-")
            convert_checkpoint(tiny_pipeline_folder, made[method], recipe_for(method))
        return made[method]

    return make


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / WEIGHTS)


def dequantized_layers(component: Path) -> dict[str, torch.Tensor]:
    """The layers under diffusers' names, of files with ComfyUI's names too."""
    with open_quantized(component) as opened:
        layers = {stem: layer.dequantize(0, layer.shape[0]) for stem, layer in opened.layers.items()}
    parts = {stem: (diffusers_names(stem), weight.chunk(len(diffusers_names(stem)))) for stem, weight in layers.items()}
    return {name: part for names, weights in parts.values() for name, part in zip(names, weights, strict=True)}


def diffusers_names(stem: str) -> list[str]:
    if stem.endswith(".attention.qkv"):
        return [stem.replace("qkv", f"to_{part}") for part in "qkv"]
    return [stem.replace(".attention.out", ".attention.to_out.0")]


def test_the_command_line_knows_the_dialects_that_are_written() -> None:
    written = {
        name for name, dialect in DIALECTS.items() if not f"{dialect.spelling(Int8(), (64, 64))}".endswith("only read")
    }
    assert set(WRITTEN) == written


@pytest.mark.parametrize(("dialect", "method"), CASES)
def test_keep_there_and_back_gives_the_same_tensors(quantized, dialect: str, method: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    original = quantized(method)
    there = Recipe(method="keep", dialect=dialect)
    convert_checkpoint(original, tmp_path / "there", there)
    with open_quantized(tmp_path / "there" / "transformer") as opened:
        assert opened.dialect == dialect
    if (dialect, method) == ("modelopt", "fp8"):  # one scale a row there, which vLLM-Omni's own method does not have
        return
    convert_checkpoint(tmp_path / "there", tmp_path / "back", Recipe(method="keep"))
    first, second = (folder / "transformer" for folder in (original, tmp_path / "back"))
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert before.keys() == after.keys()  # where in the file they lie is that of its source
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype, name
        assert bytes_of(tensor) == bytes_of(after[name]), name
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())


@pytest.mark.parametrize(("dialect", "method"), CASES)
def test_quantizing_in_a_dialect_and_keeping_into_it_agree(
    quantized,  # type: ignore[no-untyped-def]
    tiny_pipeline_folder: Path,
    dialect: str,
    method: str,
    tmp_path: Path,
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "direct", recipe_for(method, dialect=dialect))
    convert_checkpoint(quantized(method), tmp_path / "kept", Recipe(method="keep", dialect=dialect, force=True))
    direct, kept = weights_of(tmp_path / "direct"), weights_of(tmp_path / "kept")
    assert direct.keys() == kept.keys()
    for name, tensor in direct.items():
        assert (tensor.dtype, tensor.shape) == (kept[name].dtype, kept[name].shape), name
        # Quantized for these, each row has a scale of its own.
        if (dialect, method) not in (("modelopt", "fp8"), ("comfyui", "int8")):
            assert tensor.view(torch.uint8 if tensor.dim() else tensor.dtype).equal(
                kept[name].view(torch.uint8 if tensor.dim() else tensor.dtype)
            ), name
    configs = [json.loads((tmp_path / run / "transformer" / "config.json").read_text()) for run in ("direct", "kept")]
    assert configs[0] == configs[1]
    assert sorted(dequantized_layers(tmp_path / "kept" / "transformer")) == sorted(
        dequantized_layers(quantized(method) / "transformer")
    )


@pytest.mark.parametrize("method", ["fp8", "fp8 blocks", "int8", "mxfp8", "mxfp4", "nvfp4"])
def test_dequantize_gives_the_values_in_bf16_and_a_plain_config(quantized, method: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = quantized(method)
    result = CliRunner().invoke(main, ["dequantize", str(source), "-o", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    weights = weights_of(tmp_path / "out")
    expected = dequantized_layers(source / "transformer")
    assert {f"{stem}.weight" for stem in expected} <= weights.keys()
    for stem, weight in expected.items():
        assert weights[f"{stem}.weight"].equal(weight.to(torch.bfloat16)), stem
    assert not [name for name in weights if "scale" in name.rpartition(".")[2]]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())


def test_a_dequantized_pipeline_loads_in_plain_diffusers(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from diffusers import ZImageTransformer2DModel

    convert_checkpoint(quantized("int8"), tmp_path / "out", Recipe(method="dequantize"))
    model = ZImageTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer", torch_dtype=torch.bfloat16)
    assert model.state_dict()[f"{LAYER}.weight"].dtype is torch.bfloat16


def test_quantizing_again_says_so_and_equals_quantizing_what_was_dequantized(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    report = convert_checkpoint(quantized("int8"), tmp_path / "again", Recipe())
    assert "dequantized in float32 and quantized again to fp8" in report.notes[0]
    convert_checkpoint(quantized("int8"), tmp_path / "float", Recipe(method="dequantize", dtype="float32"))
    convert_checkpoint(tmp_path / "float", tmp_path / "twice", Recipe())
    again, twice = weights_of(tmp_path / "again"), weights_of(tmp_path / "twice")
    for suffix in ("weight", "weight_scale"):
        assert again[f"{LAYER}.{suffix}"].float().equal(twice[f"{LAYER}.{suffix}"].float())


def test_layers_left_alone_when_quantizing_again_become_bf16(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    convert_checkpoint(quantized("int8"), tmp_path / "out", Recipe(ignored_layers=("layers.0",)))
    assert weights_of(tmp_path / "out")[f"{LAYER}.weight"].dtype is torch.bfloat16


def refused(source: Path, output: Path, recipe: Recipe) -> str:
    with pytest.raises(OmniConvertError) as caught:
        convert_checkpoint(source, output, recipe)
    assert not output.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_format_without_a_word_in_the_dialect_is_refused_by_layer(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for dialect, method in (("comfyui", "mxfp4"), ("modelopt", "int8"), ("compressed-tensors", "mxfp4_dualscale")):
        message = refused(quantized(method), tmp_path / "out", Recipe(method="keep", dialect=dialect))
        assert "layers.0.attention" in message or "refiner" in message
        assert method.split("_")[0] in message


def test_an_inexact_reciprocal_is_refused_by_tensor(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "source"
    shutil.copytree(quantized("nvfp4"), source)
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    inexact = torch.tensor(1.5006104707717896)  # its neighbours have the same float32 reciprocals
    for name in tensors:
        if name.endswith("weight_scale_2"):
            tensors[name] = inexact.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = Recipe(method="keep", dialect="compressed-tensors")
    assert ".weight_scale_2'" in refused(source, tmp_path / "out", recipe)
    convert_checkpoint(source, tmp_path / "forced", Recipe(method="keep", dialect="compressed-tensors", force=True))
    scale = weights_of(tmp_path / "forced")[f"{LAYER}.weight_global_scale"]
    assert abs(1 / scale.double().item() / inexact.item() - 1) < 2**-23


def test_what_vllm_omni_would_misread_is_refused(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "source"
    shutil.copytree(quantized("nvfp4"), source)
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[f"{LAYER}.weight_scale_2"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(source, tmp_path / "out", Recipe(method="keep"))
    assert "to_q.weight_scale_2'" in message or "to_k.weight_scale_2'" in message
    assert "merges" in message


def test_the_description_labels_every_tensor(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    convert_checkpoint(quantized("int8"), tmp_path / "out", Recipe(method="keep", dialect="msmodelslim"))
    labels = json.loads((tmp_path / "out" / "transformer" / "quant_model_description.json").read_text())
    tensors = weights_of(tmp_path / "out")
    assert labels.keys() - tensors.keys() == {"model_quant_type", "group_size", "metadata", "optional", "version"}
    assert tensors.keys() <= labels.keys()
    assert (labels["model_quant_type"], labels["group_size"]) == ("W8A8_DYNAMIC", 0)
    assert {labels[f"{LAYER}.{suffix}"] for suffix in ("weight", "weight_scale", "weight_offset")} == {"W8A8_DYNAMIC"}
    assert labels["cap_embedder.1.weight"] == "FLOAT"
    offset = tensors[f"{LAYER}.weight_offset"]
    assert tuple(offset.shape) == (192, 1)
    assert not offset.any()
    convert_checkpoint(tmp_path / "out", tmp_path / "back", Recipe(method="keep"))
    assert not list((tmp_path / "back").rglob("quant_model_description*"))


def test_w4a16_is_spelled_as_auto_round_does_whatever_the_tiles(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="w4a16", group_size=64)
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    tensors = weights_of(tmp_path / "out")
    assert tuple(tensors[f"{LAYER}.qweight"].shape) == (192 // 8, 192)
    assert set(tensors[f"{LAYER}.qzeros"].unique().tolist()) == {0x77777777}  # 8, less one
    block = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert block["packing_format"] == "auto_round:auto_gptq"
    assert block["extra_config"]["cap_embedder.1"]["bits"] == 16
    convert_checkpoint(tmp_path / "out", tmp_path / "back", Recipe(method="dequantize"))
    weight = weights_of(tmp_path / "back")[f"{LAYER}.weight"]
    original = weights_of(tiny_pipeline_folder)[f"{LAYER}.weight"]
    assert float((weight - original).float().norm() / original.float().norm()) < 0.12
    with pytest.raises(RecipeError, match="w4a16"):
        Recipe(method="fp8", group_size=64)


def rewritten(folder: Path, tensors: dict[str, torch.Tensor], **block: object) -> Path:
    """The model with these tensors of the transformer changed, and these keys of its block."""
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= block
    path.write_text(json.dumps(config))
    save_file(weights_of(folder) | tensors, folder / "transformer" / WEIGHTS, metadata={"format": "pt"})
    (folder / "omni_convert.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def w4a16(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "w4a16", Recipe(method="w4a16", group_size=64, search=False))
    return tmp_path / "w4a16"


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    with open_quantized(folder / "transformer") as opened:
        return {stem: layer.dequantize(0, layer.shape[0]) for stem, layer in opened.layers.items()}


def test_w4a16_spelled_anew_is_the_same_file(w4a16: Path, tmp_path: Path) -> None:
    convert_checkpoint(w4a16, tmp_path / "out", Recipe(method="keep", dialect="auto-round"))
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "out" / "transformer" / name).read_bytes() == (w4a16 / "transformer" / name).read_bytes()
    assert "--dialect auto-round" in refused(w4a16, tmp_path / "no", Recipe(method="keep"))


def test_every_format_spelled_anew_is_the_same_file(
    each_recipe: Recipe, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    dialect = each_recipe.dialect
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "first", each_recipe)
    if each_recipe.method == "gguf":  # whose blocks no dialect of safetensors holds
        assert "found GGUF with -m keep" in refused(tmp_path / "first", tmp_path / "no", Recipe(method="keep"))
        return
    convert_checkpoint(tmp_path / "first", tmp_path / "kept", Recipe(method="keep", dialect=dialect))
    for name in (WEIGHTS, "config.json"):
        first, kept = (tmp_path / run / "transformer" / name for run in ("first", "kept"))
        assert kept.read_bytes() == first.read_bytes(), name
    other = "compressed-tensors" if each_recipe.method.startswith(("mx", "nvfp4")) else "modelopt"
    if other == "modelopt":
        message = refused(tmp_path / "first", tmp_path / "no", Recipe(method="keep", dialect=other))
        assert "layer '" in message
        assert "which modelopt cannot hold" in message
        return
    convert_checkpoint(tmp_path / "first", tmp_path / "there", Recipe(method="keep", dialect=other, force=True))
    before, after = (dequantized(tmp_path / run) for run in ("first", "there"))
    assert before.keys() == after.keys()
    for stem, weight in before.items():  # a forced reciprocal may be off by its last bit
        torch.testing.assert_close(weight, after[stem], rtol=2**-22, atol=0)


def test_zero_points_of_either_convention_are_spelled_for_gptq(w4a16: Path, tmp_path: Path) -> None:
    zeros = {name: tensor for name, tensor in weights_of(w4a16).items() if name.endswith(".qzeros")}
    eights = {name: torch.full_like(tensor, -0x77777778) for name, tensor in zeros.items()}  # 0x88888888
    source = rewritten(w4a16, eights, packing_format="auto_round", sym=False)
    convert_checkpoint(source, tmp_path / "out", Recipe(method="keep", dialect="auto-round"))
    block = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert (block["packing_format"], block["sym"]) == ("auto_round:auto_gptq", False)
    assert weights_of(tmp_path / "out")[f"{LAYER}.qzeros"].equal(zeros[f"{LAYER}.qzeros"])
    after = dequantized(tmp_path / "out")
    assert all(weight.equal(after[stem]) for stem, weight in dequantized(source).items())


@pytest.mark.parametrize(
    ("suffix", "block", "found"),
    [
        ("qzeros", {"packing_format": "auto_round"}, "found zero points of 0 to 0, expected 1 to 16"),
        ("scales", {}, "found scales that float16 rounds"),
    ],
)
def test_what_gptqs_packing_cannot_hold_is_refused_by_the_layers_name(
    w4a16: Path, tmp_path: Path, suffix: str, block: dict[str, str], found: str
) -> None:
    stored = weights_of(w4a16)[f"{LAYER}.{suffix}"]
    changed = torch.zeros_like(stored) if suffix == "qzeros" else stored.float() * 1.0001
    source = rewritten(w4a16, {f"{LAYER}.{suffix}": changed}, **block)
    message = refused(source, tmp_path / "out", Recipe(method="keep", dialect="auto-round"))
    assert f"layer '{LAYER}': {found}" in message


NOT_FINITE = {
    "scale": ("int8", "weight_scale", torch.float32, float("nan")),
    "infinite scale": ("fp8", "weight_scale", torch.float32, float("inf")),
    "block scale": ("fp8 blocks", "weight_scale_inv", torch.float32, float("nan")),
    "code": ("fp8", "weight", torch.uint8, 0xFF),
    "E8M0": ("mxfp8", "weight_scale", torch.uint8, 255),
    "E4M3 scale": ("nvfp4", "weight_scale", torch.uint8, 0x7F),
    "scale above": ("nvfp4", "weight_scale_2", torch.float32, float("nan")),
}


@pytest.mark.parametrize(("method", "suffix", "dtype", "value"), NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_keep_refuses_what_is_not_finite_as_dequantizing_does(  # type: ignore[no-untyped-def]
    quantized, method: str, suffix: str, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    shutil.copytree(quantized(method), tmp_path / "damaged")
    (tmp_path / "damaged" / "omni_convert.json").unlink()
    file = tmp_path / "damaged" / "transformer" / WEIGHTS
    tensors = load_file(file)
    name = next(
        name
        for name in tensors
        if name.endswith(f".{suffix}")
        and name[: -len(suffix)] + "weight" in tensors
        and tensors[name[: -len(suffix)] + "weight"].element_size() == 1
    )
    tensors[name] = tensors[name].clone()
    tensors[name].view(dtype).view(-1)[-1:] = value
    save_file(tensors, file, metadata={"format": "pt"})
    dialect = "comfyui" if method in ("nvfp4", "mxfp8") else "compressed-tensors"
    for recipe in (Recipe(method="keep", dialect=dialect), Recipe(method="dequantize")):
        with pytest.raises(CheckpointError, match=f"(?s){name.rpartition('.')[0]}.*NaN"):
            convert_checkpoint(tmp_path / "damaged", tmp_path / recipe.method, recipe)
        assert not (tmp_path / recipe.method).exists()


def test_keep_of_an_unquantized_model_is_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    assert "nothing quantized" in refused(tiny_pipeline_folder, tmp_path / "out", Recipe(method="keep"))


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'comfyui'"):
        Recipe(dialect="comfyu")


def test_comfyui_files_are_marked_both_ways(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    convert_checkpoint(
        quantized("nvfp4"), tmp_path / "out", Recipe(method="keep", dialect="comfyui", max_shard_size="1MB")
    )
    (file,) = (tmp_path / "out" / "transformer").glob("*.safetensors")  # one, whatever the shard size
    with safe_open(file, "pt") as opened:
        layers = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
        assert layers[JOINED] == {"format": "nvfp4"}
        assert json.loads(bytes(opened.get_tensor(f"{JOINED}.comfy_quant").tolist())) == {"format": "nvfp4"}


def test_a_single_file_without_a_config_is_dequantized(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    convert_checkpoint(quantized("mxfp8"), tmp_path / "comfy", Recipe(method="keep", dialect="comfyui"))
    shutil.copy(tmp_path / "comfy" / "transformer" / WEIGHTS, tmp_path / "model.safetensors")
    convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", Recipe(method="dequantize"))
    weight = load_file(tmp_path / "out" / WEIGHTS)[f"{JOINED}.weight"]
    parts = dequantized_layers(quantized("mxfp8") / "transformer")
    assert weight.equal(torch.cat([parts[name] for name in diffusers_names(JOINED)]).to(torch.bfloat16))


def test_a_dry_run_names_every_layer(quantized) -> None:  # type: ignore[no-untyped-def]
    arguments = [str(quantized("nvfp4")), "-m", "keep", "--dialect", "comfyui", "--dry-run", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["layers"]
    assert {(row["from"], row["to"]) for row in rows} == {("nvfp4", "nvfp4")}
    assert f"transformer.{JOINED}" in {row["layer"] for row in rows}


def test_an_interrupted_keep_goes_on(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    recipe = Recipe(method="keep", dialect="comfyui", resume=True)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(quantized("nvfp4"), tmp_path / "out", recipe, progress=stop)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(quantized("nvfp4"), tmp_path / "out", recipe)
    convert_checkpoint(quantized("nvfp4"), tmp_path / "whole", Recipe(method="keep", dialect="comfyui"))
    files = [tmp_path / run / "transformer" / WEIGHTS for run in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="session")
def static_nvfp4(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with calibrated activation scales."""
    folder = tmp_path_factory.mktemp("static")
    (folder / "prompts.txt").write_text("a cat\n")
    recipe = Recipe(method="nvfp4", search=False, calib=folder / "prompts.txt", calib_steps=1, calib_size=(32, 32))
    convert_checkpoint(tiny_pipeline_folder, folder / "out", recipe)
    return folder / "out"


@pytest.mark.parametrize("dialect", [*(dialect for dialect in HELD if "nvfp4" in HELD[dialect]), "auto-round"])
def test_calibrated_scales_survive_in_every_dialect(static_nvfp4: Path, tmp_path: Path, dialect: str) -> None:
    convert_checkpoint(static_nvfp4, tmp_path / "there", Recipe(method="keep", dialect=dialect, force=True))
    with (
        open_quantized(static_nvfp4 / "transformer") as first,
        open_quantized(tmp_path / "there" / "transformer") as second,
    ):
        there = {name: layer for stem, layer in second.layers.items() for name in diffusers_names(stem)}
        assert first.layers.keys() == there.keys()
        for stem, layer in first.layers.items():
            scales = [each.read_tensor("input_scale", 0, 0) for each in (layer, there[stem])]
            torch.testing.assert_close(*scales, rtol=2**-23, atol=0)  # a forced reciprocal may be off by its last bit


def test_layers_in_several_formats_are_kept_where_the_dialect_can_say_so(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "source"
    shutil.copytree(quantized("nvfp4"), source)
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    other = weights_of(quantized("mxfp8"))
    mixed = ("layers.1.feed_forward.w1", "layers.1.feed_forward.w2", "layers.1.feed_forward.w3")
    for stem in mixed:
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            tensors.pop(f"{stem}.{suffix}")
        tensors |= {name: tensor for name, tensor in other.items() if name.startswith(f"{stem}.weight")}
    save_file(tensors, file, metadata={"format": "pt"})
    expected = dequantized_layers(source / "transformer")
    for dialect in (dialect for dialect in HELD if "nvfp4" in HELD[dialect]):
        convert_checkpoint(source, tmp_path / dialect, Recipe(method="keep", dialect=dialect, force=True))
        found = dequantized_layers(tmp_path / dialect / "transformer")
        assert found.keys() == expected.keys()
        for stem in mixed:
            assert found[stem].equal(expected[stem]), (dialect, stem)
    block = json.loads((tmp_path / "modelopt" / "transformer" / "config.json").read_text())["quantization_config"]
    assert block["quant_algo"] == "MIXED_PRECISION"
    listed = {name: said["quant_algo"] for name, said in block["quantized_layers"].items()}
    assert listed[mixed[0]] == listed["layers.1.feed_forward.w13"] == "MXFP8"  # as vLLM-Omni merges w1 and w3
    assert listed["layers.0.feed_forward.w13"] == listed["layers.1.attention.to_qkv"] == "W4A16_NVFP4"
    targets = {name for group in block["config_groups"].values() for name in group["targets"]}
    assert targets == listed.keys()
    message = refused(source, tmp_path / "out", Recipe(method="keep"))
    assert "--dialect modelopt" in message


def test_numbers_that_fp4_does_not_have_are_refused_not_rounded(quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(quantized("mxfp4"), tmp_path / "in")
    tensors = weights_of(tmp_path / "in")
    tensors[f"{LAYER}.weight"][3, 5] = 5.0
    save_file(tensors, tmp_path / "in" / "transformer" / WEIGHTS)
    with pytest.raises(OmniConvertError, match=rf"layer '{LAYER}': weight: found values that are not of E2M1"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", Recipe(method="keep", dialect="compressed-tensors"))


def test_codes_whose_scale_is_gone_are_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "int8", Recipe("int8"))
    file = next((tmp_path / "int8" / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["layers.1.attention.to_q.weight_scle"] = tensors.pop("layers.1.attention.to_q.weight_scale")
    save_file(tensors, file)
    for method in ("dequantize", "keep", "fp8"):
        with pytest.raises(CheckpointError, match=r"layer 'layers.1.attention.to_q': found I8 codes with no scale"):
            convert_checkpoint(tmp_path / "int8", tmp_path / method, Recipe(method))
        assert not (tmp_path / method).exists()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({}, r"layer 'layers.1.attention.to_q': found type '{}'"),
        ("FLOAT", "codes with weight_scale and weight_offset, which do not make a format"),
    ],
    ids=["unreadable", "wrong"],
)
def test_codes_whose_label_is_no_type_are_refused_for_the_label(
    label: object, expected: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "int8", Recipe("int8", dialect="msmodelslim"))
    file = tmp_path / "int8" / "transformer" / "quant_model_description.json"
    labels = json.loads(file.read_text())
    file.write_text(json.dumps(labels | {"layers.1.attention.to_q.weight": label}))
    with pytest.raises(CheckpointError, match=expected):
        convert_checkpoint(tmp_path / "int8", tmp_path / "out", Recipe("fp8"))


def test_the_output_is_not_the_source(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "int8", Recipe("int8"))
    before = {path: path.read_bytes() for path in (tmp_path / "int8").rglob("*") if path.is_file()}
    for output in (tmp_path / "int8", tmp_path / "int8" / "new"):
        with pytest.raises(OutputError, match="found the folder of the model that is read"):
            convert_checkpoint(tmp_path / "int8", output, Recipe("fp8", overwrite=True))
    assert before == {path: path.read_bytes() for path in (tmp_path / "int8").rglob("*") if path.is_file()}
