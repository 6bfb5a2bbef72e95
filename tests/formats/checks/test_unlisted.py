"""Layers that are stored unquantized and that the config block covers: every dialect with a block reports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source

VISION = ["model.visual.blocks.0.attn.qkv", "model.visual.blocks.1.attn.qkv"]


def compressed(ignore: list[str], targets: list[str] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": targets or ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def blockwise(ignore: list[str] | None) -> dict[str, Any]:
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return {**block, "modules_to_not_convert": ignore}


def modelopt(ignore: list[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ignore}


def model(folder: Path, block: dict[str, Any]) -> Path:
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.ones(64, 128).bfloat16()}
    is_blockwise = block["quant_method"] == "fp8"
    for number in range(2):
        codes = (torch.randn(256, 128, generator=torch.Generator().manual_seed(number)) * 50).to(torch.float8_e4m3fn)
        scale = torch.full((2, 1) if is_blockwise else (256, 1), 1e-3).bfloat16()
        suffix = "weight_scale_inv" if is_blockwise else "weight_scale"
        for part in ("q_proj", "o_proj"):
            stem = f"model.language_model.layers.{number}.self_attn.{part}"
            tensors |= {f"{stem}.weight": codes.clone(), f"{stem}.{suffix}": scale.clone()}
        tensors[f"{VISION[number]}.weight"] = torch.randn(64, 64).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    return folder


GOOD = {
    "compressed, names": compressed(VISION),
    "compressed, pattern": compressed(["re:.*visual.*"]),
    "compressed, targets": compressed([], ["re:.*self_attn.*"]),
    "transformers, part": blockwise(["visual"]),
    "transformers, names": blockwise(VISION),
    "modelopt, pattern": modelopt(["*visual*"]),
}
BAD = {
    "compressed, none": compressed([]),
    "compressed, old names": compressed(["visual.blocks.0.attn.qkv", "visual.blocks.1.attn.qkv"]),
    "compressed, one of two": compressed(VISION[:1]),
    "compressed, broken pattern": compressed(["re:*visual"]),
    "transformers, none": blockwise(None),
    "transformers, others": blockwise(["lm_head"]),
    "modelopt, none": modelopt([]),
}


def checks(folder: Path) -> dict[str, str]:
    (component,) = verify_source(resolve_source(folder))
    return {finding.check: finding.layer for finding in component.findings}


@pytest.mark.parametrize("block", GOOD.values(), ids=GOOD.keys())
def test_listed_layers_are_fine(tmp_path: Path, block: dict[str, Any]) -> None:
    found = checks(model(tmp_path, block))
    assert "not-ignored" not in found
    if block["quant_method"] != "modelopt":  # the others make their codes with BF16 scales
        assert "low-precision-scale" not in found


@pytest.mark.parametrize("block", BAD.values(), ids=BAD.keys())
def test_layers_that_the_block_covers_are_reported(tmp_path: Path, block: dict[str, Any]) -> None:
    folder = model(tmp_path, block)
    assert checks(folder)["not-ignored"] in VISION
    if block["quant_method"] != "modelopt":
        (component,) = inspect_source(resolve_source(folder))
        verdicts = [verdict for verdict in component.runtimes if "transformers" in verdict.runtime]
        assert all(verdict.outcome == "wrong" and "visual" in verdict.why for verdict in verdicts)


def test_keys_that_compressed_tensors_writes_are_known(tmp_path: Path) -> None:
    block = {**compressed(VISION), "moe_sparsity_config": None, "sparsity_config": {}}
    assert "unknown-key" not in checks(model(tmp_path, block))


def as_transformers_saves(folder: Path, tower: str) -> Path:
    """Qwen2.5-VL under the names of its files, which are shorter than those in its model, with one name ignored."""
    model(folder, compressed([f"{tower}.blocks.{number}.attn.qkv" for number in range(2)]))
    tensors = load_file(folder / "model.safetensors")
    short = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    save_file(short, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("tower", "is_listed"), [("model.visual", True), ("visual", False)])
def test_readers_look_up_the_names_of_the_model(tmp_path: Path, tower: str, is_listed: bool) -> None:
    folder = as_transformers_saves(tmp_path, tower)
    assert ("not-ignored" in checks(folder)) is not is_listed
    (component,) = inspect_source(resolve_source(folder))
    (verdict,) = (each for each in component.runtimes if each.runtime == "vLLM, transformers")
    assert verdict.outcome == ("loads" if is_listed else "wrong")


@pytest.mark.parametrize("method", ["fp8", "keep"])
def test_we_list_the_names_of_the_model(tmp_path: Path, method: str) -> None:
    (tmp_path / "source").mkdir()
    source = as_transformers_saves(tmp_path / "source", "visual")
    recipe = Recipe(method, dialect="compressed-tensors", runtime="diffusers", force=True, search=False)
    convert_checkpoint(source, tmp_path / "out", recipe)
    assert "not-ignored" not in checks(tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(VISION) <= set(ignored)
