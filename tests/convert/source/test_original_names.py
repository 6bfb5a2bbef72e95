"""Single files under original names give what diffusers' own conversion gives, without a weight being read for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.containers.writer import bytes_of
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.rows import TensorRows
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.table import build_format
from omni_convert.formats.views.renamed import trace_rows
from omni_convert.formats.views.renamed_layers import renamed_layers

WEIGHTS = "diffusion_pytorch_model.safetensors"
RENAMED = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.norm_q.": ".attention.q_norm.",
}


def original(tensors: dict[str, Tensor], prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """Z-Image's tensors as its authors' code and ComfyUI name them."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if name.endswith("attention.to_q.weight")]:
        parts = [renamed.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        renamed[name.replace("to_q", "qkv")] = torch.cat(parts)
    return {prefix + name: tensor for name, tensor in renamed.items()}


@pytest.fixture(scope="module")
def single_file(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    shutil.copy(tiny_pipeline_folder / "transformer" / "config.json", folder)
    save_file(original(load_file(tiny_pipeline_folder / "transformer" / WEIGHTS)), folder / "z_image.safetensors")
    return folder / "z_image.safetensors"


@pytest.mark.parametrize("method", ["fp8", "mxfp8"])
def test_a_single_file_becomes_what_the_diffusers_folder_becomes(
    tiny_pipeline_folder: Path, single_file: Path, tmp_path: Path, method: str
) -> None:
    convert_checkpoint(single_file, tmp_path / "single", Recipe(method=method))
    convert_checkpoint(tiny_pipeline_folder / "transformer", tmp_path / "folder", Recipe(method=method))
    ours, wanted = (load_file(tmp_path / run / WEIGHTS) for run in ("single", "folder"))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert ours[name].float().equal(tensor.float()), name
    configs = [(tmp_path / run / "config.json").read_text() for run in ("single", "folder")]
    assert configs[0] == configs[1]


def test_a_quantized_single_file_is_dequantized_under_diffusers_names(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    fmt: QuantizingFormat = Int8()
    plain = original(load_file(tiny_pipeline_folder / "transformer" / WEIGHTS), prefix="")
    stem = "layers.0.attention.qkv"
    quantized = fmt.quantize(plain.pop(f"{stem}.weight"))
    mark = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    parts = {f"{stem}.{suffix}": tensor for suffix, tensor in quantized.items()}
    save_file(plain | parts | {f"{stem}.comfy_quant": mark}, tmp_path / "comfy.safetensors")
    shutil.copy(tiny_pipeline_folder / "transformer" / "config.json", tmp_path)
    convert_checkpoint(tmp_path / "comfy.safetensors", tmp_path / "out", Recipe(method="dequantize"))
    found = load_file(tmp_path / "out" / WEIGHTS)
    expected = fmt.dequantize(quantized).to(torch.bfloat16).chunk(3)
    for part, weight in zip(("to_q", "to_k", "to_v"), expected, strict=True):
        assert found[f"layers.0.attention.{part}.weight"].equal(weight)
    assert not [name for name in found if name.endswith(("weight_scale", "comfy_quant"))]


QKV = "layers.0.attention.qkv"
PARTS = ("to_q", "to_k", "to_v")


def quantized_single_file(source: Path, folder: Path, fmt: QuantizingFormat, dialect: str) -> dict[str, Tensor]:
    """Writes a file under original names in which one layer, q, k and v in one, is quantized; returns its tensors."""
    plain = original(load_file(source / "transformer" / WEIGHTS), prefix="")
    weight = plain.pop(f"{QKV}.weight")
    tensors = fmt.quantize(weight)
    spelling = DIALECTS[dialect].spelling(fmt, tuple(weight.shape))
    assert not isinstance(spelling, str)
    layer = {f"{QKV}.{suffix}": tensor for suffix, tensor in spelling.encode(tensors).items()}
    save_file(plain | layer, folder / "model.safetensors")
    config = json.loads((source / "transformer" / "config.json").read_text())
    block = DIALECTS[dialect].block({QKV: fmt}, ())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": block} if block else {})))
    return tensors


@pytest.mark.parametrize("method", ["fp8", "int8", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("dialect", ["vllm-omni", "modelopt", "compressed-tensors"])
def test_layers_kept_quantized_are_cut_as_diffusers_cuts_them_bit_for_bit(
    tiny_pipeline_folder: Path, tmp_path: Path, method: str, dialect: str
) -> None:
    fmt = build_format(method)
    if isinstance(DIALECTS[dialect].spelling(fmt, (192, 192)), str):
        pytest.skip(f"{dialect} has no {method}")
    tensors = quantized_single_file(tiny_pipeline_folder, tmp_path, fmt, "comfyui")
    recipe = Recipe(method="keep", dialect=dialect, force=True)  # one over a scale may not come back
    convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", recipe)
    plain = load_file(tiny_pipeline_folder / "transformer" / WEIGHTS)
    with open_quantized(tmp_path / "out") as opened:
        stems = [f"layers.0.attention.{part}" for part in PARTS]
        assert list(opened.layers) == stems
        for index, stem in enumerate(stems):
            rows = slice(192 * index, 192 * (index + 1))
            part = {suffix: tensor[rows] if tensor.dim() else tensor for suffix, tensor in tensors.items()}
            assert opened.layers[stem].dequantize(0, 192).equal(fmt.dequantize(part))
        kept = {name for name in plain if name.removesuffix(".weight") not in stems}
        assert opened.kept.keys() == kept
        for name in kept:
            assert bytes_of(opened.checkpoint.read(name)) == bytes_of(plain[name]), name


def test_layers_for_comfyui_keep_the_names_of_the_file(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    quantized_single_file(tiny_pipeline_folder, tmp_path, Fp8Block((64, 64)), "transformers")
    convert_checkpoint(
        tmp_path / "model.safetensors", tmp_path / "there", Recipe(method="keep", dialect="transformers")
    )
    quantized_single_file(tiny_pipeline_folder, tmp_path, Int8(), "comfyui")
    recipe = Recipe(method="keep", dialect="comfyui")
    convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "back", recipe)
    with open_quantized(tmp_path / "there") as there, open_quantized(tmp_path / "back") as back:
        assert list(there.layers) == [f"layers.0.attention.{part}" for part in PARTS]
        assert list(back.layers) == [QKV]


def test_names_that_cannot_be_converted_without_a_config_are_told_of(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    quantized_single_file(tiny_pipeline_folder, tmp_path, Int8(), "comfyui")
    (tmp_path / "config.json").unlink()
    recipe = Recipe(method="keep", dialect="compressed-tensors")
    report = convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", recipe)
    assert any("there is no config.json that names the model" in note for note in report.notes)
    with pytest.raises(CheckpointError, match=r"found no config\.json that names the model"):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "omni", Recipe(method="keep"))


def test_layers_that_would_be_cut_inside_a_block_of_scales_are_refused(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    quantized_single_file(tiny_pipeline_folder, tmp_path, Fp8Block((128, 64)), "compressed-tensors")
    recipe = Recipe(method="keep", dialect="compressed-tensors")
    with pytest.raises(CheckpointError, match=rf"to_q\.weight.*rows 0 to 191 of '{QKV}', whose scales are of 128 rows"):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", recipe)


def test_layers_are_joined_only_if_they_share_what_is_of_the_whole_weight(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(32, 64, generator=draw) for _ in range(2)]
    shared = Fp8().fit([TensorRows(part) for part in parts], None)
    runs = {"both.weight": [Run("a.weight", 0, 32), Run("b.weight", 0, 32), Run("a.weight", 8, 8)]}
    for folder, quantize in (("own", Fp8().quantize), ("shared", lambda part: Fp8().quantize_fitted(part, shared))):
        layers = {stem: quantize(part) for stem, part in zip("ab", parts, strict=True)}
        (tmp_path / folder).mkdir()
        tensors = {f"{stem}.{suffix}": tensor for stem, layer in layers.items() for suffix, tensor in layer.items()}
        save_file(tensors, tmp_path / folder / WEIGHTS)
        block = DIALECTS["vllm-omni"].block({"a": Fp8()}, ())
        (tmp_path / folder / "config.json").write_text(json.dumps({"quantization_config": block}))
        with open_quantized(tmp_path / folder) as opened:
            if folder == "own":
                with pytest.raises(CheckpointError, match=r"it would join 'a' and 'b', whose weight_scale differ"):
                    renamed_layers(opened, runs, {"both.weight": (72, 64)})
                continue
            both = renamed_layers(opened, runs, {"both.weight": (72, 64)}).layers["both"]
            a, b = (Fp8().dequantize(layers[stem]) for stem in "ab")
            assert both.dequantize(0, 72).equal(torch.cat([a, b, a[8:16]]))
            assert both.dequantize(30, 66).equal(torch.cat([a, b, a[8:16]])[30:66])


@pytest.mark.parametrize(
    ("name", "runs", "shape", "why"),
    [
        (
            "c.weight",
            [Run("a.weight", 0, 32), Run("b.weight", 0, 8)],
            (40, 64),
            "'a', which is quantized, and of 'b.we",
        ),
        ("c.bias", [Run("a.weight", 0, 32)], (32, 64), r"'a', which is quantized, and is not called NAME\.weight"),
        ("c.weight", [Run("a.weight", 0, 32)], (32, 64, 1), r"'a', .* and is no matrix but \[32, 64, 1\]"),
        ("c.weight", [Run("b.weight", 0, 8), Run("d.weight", 0, 8)], (16, 64), "rows in BF16 of 'b.weight', F16 of 'd"),
    ],
    ids=["partly quantized", "no weight", "no matrix", "two dtypes"],
)
def test_what_cannot_be_one_layer_is_refused_by_its_cause(
    name: str, runs: list[Run], shape: tuple[int, ...], why: str, tmp_path: Path
) -> None:
    tensors = {f"a.{suffix}": tensor for suffix, tensor in Fp8().quantize(torch.randn(32, 64)).items()}
    plain = {"b.weight": torch.ones(8, 64).bfloat16(), "d.weight": torch.ones(8, 64).half()}
    save_file(tensors | plain, tmp_path / WEIGHTS)
    with open_quantized(tmp_path) as opened, pytest.raises(CheckpointError, match=rf"tensor '{name}': .*{why}"):
        renamed_layers(opened, {name: runs}, {name: shape})


def test_a_file_of_another_model_is_refused_by_tensor(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    tensors = original(load_file(tiny_pipeline_folder / "transformer" / WEIGHTS))
    del tensors["model.diffusion_model.layers.1.feed_forward.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(tiny_pipeline_folder / "transformer" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w2\.weight.*1 are missing"):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", Recipe())


def test_a_single_file_without_a_config_is_told_which_one_it_needs(single_file: Path, tmp_path: Path) -> None:
    shutil.copy(single_file, tmp_path / "model.safetensors")
    result = CliRunner().invoke(main, [str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 1
    assert "config.json" in result.output
    assert "Z-Image" in result.output


def thin_flux() -> dict[str, Tensor]:
    """Black Forest Labs' names for a block of each kind, with the rows of the real model and two columns."""
    rows = {
        "time_in.in_layer": 8,
        "time_in.out_layer": 8,
        "vector_in.in_layer": 8,
        "vector_in.out_layer": 8,
        "img_in": 8,
        "txt_in": 8,
        "final_layer.linear": 4,
        "final_layer.adaLN_modulation.1": 8,
        "single_blocks.0.modulation.lin": 6,
        "single_blocks.0.linear1": 21504,
        "single_blocks.0.linear2": 8,
    }
    for stream in ("img", "txt"):
        rows |= {
            f"double_blocks.0.{stream}_mod.lin": 6,
            f"double_blocks.0.{stream}_attn.qkv": 9,
            f"double_blocks.0.{stream}_attn.proj": 4,
            f"double_blocks.0.{stream}_mlp.0": 8,
            f"double_blocks.0.{stream}_mlp.2": 4,
        }
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for stem, count in rows.items():
        tensors[f"{stem}.weight"] = torch.randn(count, 2, generator=draw)
        tensors[f"{stem}.bias"] = torch.randn(count, generator=draw)
    norms = [f"double_blocks.0.{stream}_attn" for stream in ("img", "txt")] + ["single_blocks.0"]
    for stem in norms:
        for norm in ("query_norm", "key_norm"):
            tensors[f"{stem}.norm.{norm}.scale"] = torch.randn(4, generator=draw)
    return tensors


def test_traced_rows_of_flux_are_those_that_diffusers_takes() -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    tensors = thin_flux()
    specs = {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    traced = trace_rows(specs, convert_flux_transformer_checkpoint_to_diffusers)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    assert traced.keys() == theirs.keys()
    for name, tensor in theirs.items():
        rows = [tensors[run.source][run.start : run.start + run.count] for run in traced[name]]
        assert torch.cat(rows).equal(tensor), name
    assert len(traced["norm_out.linear.weight"]) == 2  # scale and shift change places


def test_a_conversion_that_computes_is_refused_by_tensor() -> None:
    specs = {"a.weight": TensorSpec("a.weight", torch.float32, (4, 2))}
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        trace_rows(specs, lambda tensors: {"b.weight": tensors["a.weight"] * 0.5})
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        trace_rows(specs, lambda tensors: {"b.weight": tensors["a.weight"].T})


def test_a_missing_tensor_is_named_not_the_key_that_a_conversion_missed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """FLUX.1 under diffusers' names: its conversion fails with a KeyError about a name that is due nowhere."""
    settings = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2}
    sizes = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}
    model = FluxTransformer2DModel(**settings, **sizes, in_channels=4).to(torch.bfloat16)
    tensors = model.state_dict()
    del tensors["time_text_embed.text_embedder.linear_1.weight"]
    save_file(tensors, tmp_path / "flux.safetensors")
    config = dict(model.config) | {"_class_name": "FluxTransformer2DModel", "of another version": list(range(500))}
    (tmp_path / "config.json").write_text(json.dumps(config, default=list))
    with pytest.raises(CheckpointError, match=r"time_text_embed\.text_embedder\.linear_1\.weight.*1 are missing"):
        convert_checkpoint(tmp_path / "flux.safetensors", tmp_path / "out", Recipe())
    assert "of another version" not in capfd.readouterr().err
