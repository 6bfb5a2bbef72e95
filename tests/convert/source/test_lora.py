"""LoRA files are baked in whole, as PEFT would apply them, or refused with the names that match nothing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.convert.recipe import LoraRequest
from omni_convert.convert.source.lora import read_lora
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, OmniConvertError, RecipeError

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEMS = ("layers.0.attention.to_q", "layers.1.feed_forward.w1", "context_refiner.0.attention.to_out.0")
SHAPES = {STEMS[0]: (192, 192), STEMS[1]: (512, 192), STEMS[2]: (192, 192)}


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Layer to (down, up) of rank 8, so large that they matter."""
    draw = torch.Generator().manual_seed(0)
    return {
        stem: (torch.randn(8, columns, generator=draw) * 0.05, torch.randn(rows, 8, generator=draw) * 0.05)
        for stem, (rows, columns) in SHAPES.items()
    }


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> LoraRequest:
    save_file(tensors, path, metadata=metadata)
    return LoraRequest(path)


def spelled(pairs: dict[str, tuple[Tensor, Tensor]], form: str) -> dict[str, Tensor]:
    """The file's tensors as trainers write them."""
    prefix, down, up = {
        "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight"),
        "peft": ("base_model.model.", "lora_A.weight", "lora_B.weight"),
        "comfyui": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
        "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight"),
    }[form]
    names = {stem: prefix + (stem.replace(".", "_") if form == "kohya" else stem) for stem in pairs}
    return {
        f"{names[stem]}.{leaf}": tensor
        for stem, pair in pairs.items()
        for leaf, tensor in zip((down, up), pair, strict=True)
    }


def baked(source: Path, output: Path, *requests: LoraRequest, method: str = "keep", **options: object) -> Path:
    convert_checkpoint(source, output, Recipe(method=method, lora=requests, **options))  # type: ignore[arg-type]
    return output / "transformer" / WEIGHTS


def expected(source: Path, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    weights = load_file(source / "transformer" / WEIGHTS)
    sums = {
        f"{stem}.weight": weights[f"{stem}.weight"].double() + up.double() @ down.double() * scale
        for stem, (down, up) in pairs.items()
    }
    return weights | {name: total.float().to(torch.bfloat16) for name, total in sums.items()}


@pytest.mark.parametrize("form", ["diffusers", "peft", "comfyui", "kohya"])
def test_every_spelling_of_names_gives_the_same_weights(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, form: str
) -> None:
    request = write(tmp_path / "a.safetensors", spelled(pairs, form))
    found = load_file(baked(tiny_pipeline_folder, tmp_path / "out", request))
    wanted = expected(tiny_pipeline_folder, pairs, 1.0)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("kind", ["tensors", "header", "pattern", "rslora", "folder"])
def test_alpha_counts_wherever_it_is_said(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, kind: str
) -> None:
    tensors, metadata, scale = spelled(pairs, "diffusers"), None, 0.5  # alpha 4 over rank 8
    adapter: dict[str, object] = {"lora_alpha": 4}
    if kind == "tensors":
        tensors |= {f"transformer.{stem}.alpha": torch.tensor(4.0) for stem in pairs}
    elif kind == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    else:
        if kind == "pattern":
            adapter = {"lora_alpha": 99, "alpha_pattern": {".*": 4}}
        elif kind == "rslora":
            adapter, scale = {"lora_alpha": 4, "use_rslora": True}, 4 / 8**0.5
        described = {f"transformer.{key}": value for key, value in adapter.items()}
        metadata = {"lora_adapter_metadata": json.dumps(described)}
    request = write(tmp_path / "a.safetensors", tensors, metadata)
    found = load_file(baked(tiny_pipeline_folder, tmp_path / "out", request))
    for name, tensor in expected(tiny_pipeline_folder, pairs, scale).items():
        assert found[name].equal(tensor), name


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "4", "r": "8"}, 0.5),
        ({"network_alpha": "4"}, 0.5),
        ({"alpha": "4", "rank": "8"}, 0.5),
        ({"transformer.lora_alpha": "4", "transformer.r": "8"}, 0.5),
        ({"lora_alpha": "4", "use_rslora": "True"}, 4 / 8**0.5),
        ({"lora_alpha": "4", "alpha": "99"}, 0.5),
        ({"alpha": "None"}, 1.0),
        ({"text_encoder.lora_alpha": "4"}, 1.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "text_encoder.lora_alpha": 99})}, 0.5),
        ({"lora_adapter_metadata": json.dumps({"text_encoder.r": 8, "transformer.lora_alpha": 4}), "alpha": "99"}, 0.5),
    ],
)
def test_plain_keys_of_the_header_give_the_strength(
    tiny_pipeline_folder: Path,
    pairs: dict[str, tuple[Tensor, Tensor]],
    tmp_path: Path,
    metadata: dict[str, str],
    scale: float,
) -> None:
    request = write(tmp_path / "a.safetensors", spelled(pairs, "diffusers"), metadata)
    found = load_file(baked(tiny_pipeline_folder, tmp_path / "out", request))
    for name, tensor in expected(tiny_pipeline_folder, pairs, scale).items():
        assert found[name].equal(tensor), name


def notes_of(source: Path, request: LoraRequest) -> tuple[str, ...]:
    with Checkpoint.open(source / "transformer") as checkpoint:
        return read_lora(request, checkpoint, "ZImageTransformer2DModel").notes


def test_an_alpha_that_converters_fold_in_is_noted_and_tensors_count_before_the_header(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    tensors, metadata = spelled(pairs, "kohya"), {"ss_network_alpha": "4", "ss_network_dim": "8"}
    request = write(tmp_path / "a.safetensors", tensors, metadata)
    assert any(
        "ss_network_alpha 4" in note and "FILE:SCALE" in note for note in notes_of(tiny_pipeline_folder, request)
    )
    found = load_file(baked(tiny_pipeline_folder, tmp_path / "folded", request))
    assert all(found[name].equal(tensor) for name, tensor in expected(tiny_pipeline_folder, pairs, 1.0).items())
    tensors |= {name.replace("lora_down.weight", "alpha"): torch.tensor(2.0) for name in tensors if "down" in name}
    request = write(tmp_path / "b.safetensors", tensors, metadata | {"lora_alpha": "99"})
    assert not notes_of(tiny_pipeline_folder, request)
    found = load_file(baked(tiny_pipeline_folder, tmp_path / "own", request))
    assert all(found[name].equal(tensor) for name, tensor in expected(tiny_pipeline_folder, pairs, 0.25).items())


@pytest.mark.parametrize(
    ("config", "other", "note", "scale"),
    [
        ({"r": 8, "lora_alpha": 4}, "adapter_model.safetensors", "is about adapter_model.safetensors", 1.0),
        ({"r": 8, "lora_alpha": 4}, "b.safetensors", None, 0.5),
        ({"lora_alpha": 4}, "b.safetensors", "does not say r", 1.0),
        ({"r": 16, "lora_alpha": 4}, None, "it says r 16", 1.0),
        ({"r": 16, "rank_pattern": {".*": 8}, "lora_alpha": 4}, None, None, 0.5),
        ({"r": 8, "lora_alpha": 4, "target_modules": ["to_q", "w1", "to_out.0"]}, None, None, 0.5),
        ({"r": 8, "lora_alpha": 4, "target_modules": ["to_q"]}, None, "none of its target_modules", 1.0),
    ],
)
def test_a_description_in_the_folder_counts_only_for_its_own_file(
    tiny_pipeline_folder: Path,
    pairs: dict[str, tuple[Tensor, Tensor]],
    tmp_path: Path,
    config: dict[str, object],
    other: str | None,
    note: str | None,
    scale: float,
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if other is not None:
        write(tmp_path / other, spelled(pairs, "peft"))
    request = write(tmp_path / "a.safetensors", spelled(pairs, "diffusers"))
    notes = notes_of(tiny_pipeline_folder, request)
    assert note in notes[0] if note else not notes
    found = load_file(baked(tiny_pipeline_folder, tmp_path / "out", request))
    for name, tensor in expected(tiny_pipeline_folder, pairs, scale).items():
        assert found[name].equal(tensor), name


def test_what_is_baked_is_what_diffusers_fuses(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed: diffusers cannot fuse")
    from diffusers import ZImagePipeline

    tensors = spelled(pairs, "kohya")
    tensors |= {name.replace("lora_down.weight", "alpha"): torch.tensor(2.0) for name in tensors if "down" in name}
    request = write(tmp_path / "a.safetensors", tensors)
    pipe = ZImagePipeline.from_pretrained(tiny_pipeline_folder).to(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's
        pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
        pipe.fuse_lora(lora_scale=0.75)
    pipe.unload_lora_weights()
    theirs = pipe.transformer.state_dict()
    found = load_file(
        baked(
            tiny_pipeline_folder,
            tmp_path / "out",
            LoraRequest(request.path, 0.75),
            method="dequantize",
            dtype="float32",
        )
    )
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_several_files_add_up_and_scales_count(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    write(tmp_path / "a.safetensors", spelled(pairs, "diffusers"))
    arguments = ["-m", "keep", "--lora", f"{tmp_path}/a.safetensors:0.5", "--lora", f"{tmp_path}/a.safetensors:0.25"]
    result = CliRunner().invoke(main, [str(tiny_pipeline_folder), *arguments, "-o", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    for name, tensor in expected(tiny_pipeline_folder, pairs, 0.75).items():
        assert found[name].equal(tensor), name
    manifest = json.loads((tmp_path / "out" / "omni_convert.json").read_text())
    assert [lora["scale"] for lora in manifest["loras"]["transformer"]] == [0.5, 0.25]
    assert len(manifest["loras"]["transformer"][0]["sha256"]) == 64


def test_biases_are_added_to_biases(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    stem = "cap_embedder.1"
    tensors = {
        f"transformer.{stem}.lora_A.weight": torch.randn(4, 64, generator=draw),
        f"transformer.{stem}.lora_B.weight": torch.randn(192, 4, generator=draw),
        f"transformer.{stem}.lora_B.bias": torch.randn(192, generator=draw),
        f"transformer.{stem}.alpha": torch.tensor(2.0),
    }
    before = load_file(tiny_pipeline_folder / "transformer" / WEIGHTS)[f"{stem}.bias"]
    request = write(tmp_path / "a.safetensors", tensors)
    after = load_file(baked(tiny_pipeline_folder, tmp_path / "out", request))[f"{stem}.bias"]
    assert after.equal((before.float() + 0.5 * tensors[f"transformer.{stem}.lora_B.bias"]).to(torch.bfloat16))


def test_quantized_layers_are_quantized_from_the_sum_in_float32(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    request = write(tmp_path / "a.safetensors", spelled(pairs, "diffusers"))
    direct = baked(tiny_pipeline_folder, tmp_path / "direct", request, method="int8")
    baked(tiny_pipeline_folder, tmp_path / "float", request, method="dequantize", dtype="float32")
    convert_checkpoint(tmp_path / "float", tmp_path / "after", Recipe(method="int8"))
    ours, theirs = load_file(direct), load_file(tmp_path / "after" / "transformer" / WEIGHTS)
    for stem in STEMS:
        assert ours[f"{stem}.weight"].equal(theirs[f"{stem}.weight"])
        assert ours[f"{stem}.weight_scale"].equal(theirs[f"{stem}.weight_scale"])


def test_the_number_of_workers_does_not_show(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    request = write(tmp_path / "a.safetensors", spelled(pairs, "diffusers"))
    files = [baked(tiny_pipeline_folder, tmp_path / f"{n}", request, method="fp8", workers=n) for n in (1, 3)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_finished_output_is_not_taken_for_that_of_another_lora(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    request = write(tmp_path / "a.safetensors", spelled(pairs, "diffusers"))
    baked(tiny_pipeline_folder, tmp_path / "out", request)
    baked(tiny_pipeline_folder, tmp_path / "out", request, resume=True)
    with pytest.raises(OmniConvertError, match="another conversion"):
        baked(tiny_pipeline_folder, tmp_path / "out", LoraRequest(request.path, 0.5), resume=True)


def refused(source: Path, output: Path, request: LoraRequest, **options: object) -> str:
    with pytest.raises(OmniConvertError) as caught:
        baked(source, output, request, **options)  # type: ignore[arg-type]
    assert not output.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_that_match_nothing_are_named_and_left_out_only_by_force(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    other = {f"text_encoder.layers.0.q_proj.{leaf}.weight": torch.ones(8, 8) for leaf in ("lora_A", "lora_B")}
    request = write(tmp_path / "a.safetensors", spelled(pairs, "diffusers") | other)
    message = refused(tiny_pipeline_folder, tmp_path / "out", request)
    assert "text_encoder.layers.0.q_proj.lora_A.weight" in message
    assert "--force" in message
    found = load_file(baked(tiny_pipeline_folder, tmp_path / "out", request, force=True))
    assert found[f"{STEMS[0]}.weight"].equal(expected(tiny_pipeline_folder, pairs, 1.0)[f"{STEMS[0]}.weight"])
    manifest = json.loads((tmp_path / "out" / "omni_convert.json").read_text())
    assert manifest["loras"]["transformer"][0]["left_out"] == sorted(other)


@pytest.mark.parametrize("leaf", ["dora_scale", "lora_magnitude_vector", "lokr_w1", "hada_w1_a"])
def test_other_kinds_of_adapters_are_refused(tiny_pipeline_folder: Path, tmp_path: Path, leaf: str) -> None:
    request = write(tmp_path / "a.safetensors", {f"transformer.{STEMS[0]}.{leaf}": torch.ones(8, 8)})
    assert leaf in refused(tiny_pipeline_folder, tmp_path / "out", request)


def test_half_a_pair_another_shape_and_nan_are_refused(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    whole = spelled(pairs, "diffusers")
    up = f"transformer.{STEMS[0]}.lora_B.weight"
    flawed = {
        "half": {name: tensor for name, tensor in whole.items() if name != up},
        "shape": whole | {up: torch.ones(191, 8)},
        "nan": whole | {up: torch.full((192, 8), torch.nan)},
    }
    for kind, tensors in flawed.items():
        message = refused(tiny_pipeline_folder, tmp_path / "out", write(tmp_path / f"{kind}.safetensors", tensors))
        assert STEMS[0] in message


def test_a_quantized_model_cannot_keep_its_values_with_a_lora(
    tiny_pipeline_folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    request = write(tmp_path / "a.safetensors", spelled(pairs, "diffusers"))
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "int8", Recipe(method="int8"))
    assert "-m keep" in refused(tmp_path / "int8", tmp_path / "out", request)
    found = load_file(baked(tmp_path / "int8", tmp_path / "out", request, method="dequantize"))
    assert found[f"{STEMS[0]}.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("a.safetensors", LoraRequest(Path("a.safetensors"))),
        ("a.safetensors:0.5", LoraRequest(Path("a.safetensors"), 0.5)),
        ("a:b.safetensors:-1", LoraRequest(Path("a:b.safetensors"), -1.0)),
        ("a:b.safetensors", LoraRequest(Path("a:b.safetensors"))),
        ("transformer_2=x/a.safetensors:2", LoraRequest(Path("x/a.safetensors"), 2.0, "transformer_2")),
    ],
)
def test_the_option_names_file_scale_and_component(text: str, request_: LoraRequest) -> None:
    assert LoraRequest.parse(text) == request_


def test_calibration_would_run_without_the_lora(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="bake it first"):
        Recipe(lora=(LoraRequest(tmp_path / "a.safetensors"),), calib=tmp_path / "prompts.txt")


def test_a_layer_that_a_lora_drowns_is_a_warning_in_one_line(
    tiny_pipeline_folder: Path, tmp_path: Path, pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    request = write(tmp_path / "lora.safetensors", spelled({STEMS[0]: pairs[STEMS[0]]}, "diffusers"))
    arguments = [str(tiny_pipeline_folder), "-o", str(tmp_path / "out"), "--lora", f"{request.path}:1e9", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert line.startswith("Warning: transformer.layers.0.attention.to_")  # k and v share the scale of q
    assert "found a relative error of 1, and 1 more above 0.5" in line
    assert "share their scale (is the LoRA's SCALE too large?); --ignored-layers" in line
    assert json.loads(result.stdout)["warnings"] == [line.removeprefix("Warning: ")]


def test_names_with_underscores_for_dots_are_those_of_the_model(flux_folder: Path, tmp_path: Path) -> None:
    """diffusers' own conversion refuses them for Flux and Wan."""
    stem = "single_transformer_blocks.0.attn.to_k"
    down, up = torch.randn(4, 64) * 0.1, torch.randn(64, 4) * 0.1
    written = f"lora_unet_{stem.replace('.', '_')}"
    tensors = {f"{written}.lora_down.weight": down, f"{written}.lora_up.weight": up}
    request = write(tmp_path / "lora.safetensors", tensors | {f"{written}.alpha": torch.tensor(2.0)})
    convert_checkpoint(flux_folder, tmp_path / "out", Recipe(method="keep", lora=(request,)))
    before, after = (load_file(folder / WEIGHTS) for folder in (flux_folder, tmp_path / "out"))
    assert {name for name in before if not after[name].equal(before[name])} == {f"{stem}.weight"}
    sum_of = before[f"{stem}.weight"].double() + up.double() @ down.double() * 0.5
    torch.testing.assert_close(after[f"{stem}.weight"], sum_of.float().to(torch.bfloat16))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_a_folder_stands_for_the_one_lora_in_it(
    tiny_pipeline_folder: Path, tmp_path: Path, pairs: dict[str, tuple[Tensor, Tensor]], name: str
) -> None:
    (tmp_path / "lora").mkdir()
    file = write(tmp_path / "lora" / name, spelled(pairs, "diffusers"))
    alone = load_file(baked(tiny_pipeline_folder, tmp_path / "a", file))
    whole = load_file(baked(tiny_pipeline_folder, tmp_path / "b", LoraRequest(tmp_path / "lora")))
    assert all(tensor.equal(alone[key]) for key, tensor in whole.items())
    manifest = json.loads((tmp_path / "b" / "omni_convert.json").read_text())
    assert manifest["loras"]["transformer"][0]["name"] == name


@pytest.mark.parametrize(
    ("names", "found"), [((), "found no .safetensors file"), (("a", "b"), r"found a\.safetensors, b\.safetensors")]
)
def test_a_folder_with_no_lora_or_several_is_refused(
    tiny_pipeline_folder: Path, tmp_path: Path, names: tuple[str, ...], found: str
) -> None:
    (tmp_path / "lora").mkdir()
    for name in names:
        write(tmp_path / "lora" / f"{name}.safetensors", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"{found} in this folder, expected one LoRA, as pytorch_lora_weights"):
        baked(tiny_pipeline_folder, tmp_path / "out", LoraRequest(tmp_path / "lora"))
