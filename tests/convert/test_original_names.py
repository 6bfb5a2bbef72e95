"""Single files under original names give what diffusers' own conversion gives, without a weight being read for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli import main
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import Format
from omni_convert.formats.gathered import trace_rows
from omni_convert.formats.int8 import Int8
from omni_convert.formats.tensor_spec import TensorSpec

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
    fmt: Format = Int8()
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
