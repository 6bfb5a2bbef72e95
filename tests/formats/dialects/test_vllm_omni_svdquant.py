"""SVDQuant for vLLM-Omni: layers that it merges are written merged, where its loader takes them so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.qwen_image import QWEN_IMAGE
from omni_convert.formats.families.z_image import Z_IMAGE
from omni_convert.formats.finding import Finding

Errors = Callable[[Path], list[Finding]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
WEIGHTS = "diffusion_pytorch_model.safetensors"
RANK, METHOD = 16, "svdquant_nvfp4"
ATTENTION = "transformer_blocks.0.attn"
MERGED = {
    f"{ATTENTION}.to_qkv": tuple(f"{ATTENTION}.to_{part}" for part in "qkv"),
    f"{ATTENTION}.add_kv_proj": tuple(f"{ATTENTION}.add_{part}_proj" for part in "qkv"),
}


def qwen_image() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def z_image() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=384, n_layers=1, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=64,
        axes_dims=[16, 24, 24], axes_lens=[64, 32, 32],
    )  # fmt: skip


def saved(build: Callable[[], Any], folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(qwen_image, tmp_path_factory.mktemp("svdquant") / "model")


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """The second block's attention of the image stream stays."""
    kept = "transformer_blocks.1.attn.to_q"
    convert_checkpoint(source, source.parent / "out", Recipe(method=METHOD, rank=RANK, ignored_layers=(kept,)))
    return source.parent / "out"


def test_merged_layers_have_the_names_and_shapes_of_the_runtime(source: Path, converted: Path) -> None:
    tensors = load_file(converted / WEIGHTS)
    with Checkpoint.open(source) as original:
        for stem, parts in MERGED.items():
            rows = sum(original[f"{part}.weight"].shape[0] for part in parts)
            columns = original[f"{parts[0]}.weight"].shape[1]
            found = {name: tensors[f"{stem}.{name}"] for name in ("qweight", "wscales", "proj_down", "proj_up", "bias")}
            assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
                "qweight": (rows, columns // 2), "wscales": (columns // 16, rows), "proj_down": (columns, RANK),
                "proj_up": (rows, RANK), "bias": (rows,),
            }  # fmt: skip
            assert tensors[f"{stem}.wtscale"].shape == (1,)
            assert tensors[f"{stem}.bias"].equal(torch.cat([original.read(f"{part}.bias") for part in parts]))
            assert not any(name.startswith(f"{part}.") for name in tensors for part in parts)
    kept = "transformer_blocks.1.attn.to_qkv"
    assert tensors[f"{kept}.weight"].dtype is torch.bfloat16
    block = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert kept in block["modules_to_not_convert"]


def test_it_is_sound_and_both_runtimes_load_it(converted: Path, errors: Errors) -> None:
    assert errors(converted) == []
    (component,) = inspect_source(resolve_source(converted))
    outcomes = {verdict.runtime: verdict.outcome for verdict in component.runtimes}
    assert outcomes["vLLM-Omni 0.30"] == outcomes["omni_convert.loaders"] == "loads"


def test_our_loader_splits_what_is_merged(source: Path, converted: Path) -> None:
    import diffusers

    import omni_convert.loaders  # noqa: F401  # registers the quantizers

    model = diffusers.QwenImageTransformer2DModel.from_pretrained(converted, torch_dtype=torch.bfloat16)
    with Checkpoint.open(source) as original:
        for part in (part for parts in MERGED.values() for part in parts):
            layer, weight = model.get_submodule(part), original.read(f"{part}.weight").float()
            assert layer.format.method == METHOD
            assert layer.bias.equal(original.read(f"{part}.bias"))
            x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
            exact = x.float() @ weight.T + layer.bias.float()
            assert float((layer(x).float() - exact).norm()) < 0.25 * float(exact.norm())
        kept = "transformer_blocks.1.attn.to_v"
        for leaf in ("weight", "bias"):
            assert getattr(model.get_submodule(kept), leaf).equal(original.read(f"{kept}.{leaf}"))


@pytest.mark.parametrize("dialect", ["nunchaku-lite", "nunchaku"])
def test_dialects_keep_it_bit_for_bit(source: Path, tmp_path: Path, dialect: str, same: Same) -> None:
    """From Nunchaku's file, whose modulations are quantized too, there and back, and the same weights everywhere."""
    convert_checkpoint(source, tmp_path / "first", Recipe(method=METHOD, dialect="nunchaku", rank=RANK))
    lite = Recipe(method="keep", dialect="nunchaku-lite", force=True)
    convert_checkpoint(tmp_path / "first", tmp_path / "lite", lite)
    steps = {"nunchaku": tmp_path / "first", "nunchaku-lite": tmp_path / "lite"}
    back = Recipe(method="keep", dialect="nunchaku")
    convert_checkpoint(steps[dialect], tmp_path / "back", back)
    assert same(load_file(tmp_path / "back" / WEIGHTS), load_file(tmp_path / "first" / WEIGHTS))
    with pytest.raises(Exception, match="vllm-omni-svdquant cannot hold"):
        convert_checkpoint(steps[dialect], tmp_path / "out", Recipe(method="keep", dialect="vllm-omni-svdquant"))


def test_what_vllm_omni_merges_is_kept_from_and_for_parts(converted: Path, tmp_path: Path, same: Same) -> None:
    lite = Recipe(method="keep", dialect="nunchaku-lite", force=True)
    convert_checkpoint(converted, tmp_path / "lite", lite)
    assert f"{ATTENTION}.to_q.qweight" in load_file(tmp_path / "lite" / WEIGHTS)
    convert_checkpoint(tmp_path / "lite", tmp_path / "back", Recipe(method="keep", dialect="vllm-omni-svdquant"))
    assert same(load_file(tmp_path / "back" / WEIGHTS), load_file(converted / WEIGHTS))
    for name, folder in {"merged": converted, "parts": tmp_path / "lite"}.items():
        convert_checkpoint(folder, tmp_path / name, Recipe(method="dequantize"))
    assert same(load_file(tmp_path / "merged" / WEIGHTS), load_file(tmp_path / "parts" / WEIGHTS))


def test_a_loader_that_takes_no_merged_layer_is_told(tmp_path: Path, wide_flux: Path, errors: Errors) -> None:
    model = saved(z_image, tmp_path / "model")
    with pytest.raises(RecipeError, match=r"w1': vLLM-Omni merges it into '.*w13'.* --ignored-layers w1 leaves such"):
        convert_checkpoint(model, tmp_path / "out", Recipe(method=METHOD, rank=RANK))
    recipe = Recipe(method=METHOD, rank=RANK, ignored_layers=("w1",))
    convert_checkpoint(model, tmp_path / "out", recipe)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {"layers.0.attention.to_qkv.qweight", "layers.0.feed_forward.w3.weight"} < tensors.keys()
    assert errors(tmp_path / "out") == []
    with pytest.raises(RecipeError, match=r"to_q': vLLM-Omni merges it into .* --ignored-layers to_q leaves"):
        convert_checkpoint(wide_flux, tmp_path / "flux", Recipe(method=METHOD, rank=RANK))
    convert_checkpoint(wide_flux, tmp_path / "flux", Recipe(method=METHOD, rank=RANK, force=True))
    assert {finding.check for finding in errors(tmp_path / "flux")} == {"part-of-merged-layer"}


def test_families_say_which_merged_layers_are_loaded() -> None:
    assert {row.original.rpartition(".")[2] for row in QWEN_IMAGE.merged_names} == {"to_qkv", "add_kv_proj"}
    assert {row.original.rpartition(".")[2] for row in Z_IMAGE.merged_names} == {"to_qkv"}
