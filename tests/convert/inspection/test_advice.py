"""Verdicts and their advice are what `-m keep` and the runtimes do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CheckpointError


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with parts of merged layers of 9 * 64 = 576 rows, which blocks of 128 do not divide."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        num_layers=1, num_attention_heads=9, attention_head_dim=64, joint_attention_dim=64, axes_dims_rope=(16, 24, 24)
    )
    folder = tmp_path_factory.mktemp("qwen") / "transformer"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_rows_are_kept_as_modelopt_spells_them(transformer: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    convert_checkpoint(transformer, tmp_path / "modelopt", Recipe(method="fp8", dialect="modelopt"))
    convert_checkpoint(tmp_path / "modelopt", rows, Recipe(method="keep", dialect="compressed-tensors"))
    (component,) = inspect_source(resolve_source(rows))
    advice = " ".join(map(str, component.runtimes))
    assert "--dialect modelopt" in advice
    assert "--dialect vllm-omni" not in advice

    with pytest.raises(CheckpointError, match="--dialect modelopt"):
        convert_checkpoint(rows, tmp_path / "refused", Recipe(method="keep", dialect="vllm-omni"))
    convert_checkpoint(rows, tmp_path / "kept", Recipe(method="keep", dialect="modelopt"))
    with open_quantized(rows) as before, open_quantized(tmp_path / "kept") as after:
        assert before.layers.keys() == after.layers.keys()
        for stem, layer in before.layers.items():
            assert layer.dequantize(0, 64).equal(after.layers[stem].dequantize(0, 64))


def test_blocks_that_reach_into_another_part_are_not_kept(transformer: Path, tmp_path: Path) -> None:
    blocks = {"method": "fp8", "weight_block_size": (128, 128), "runtime": "diffusers"}
    convert_checkpoint(transformer, tmp_path / "theirs", Recipe(**blocks, dialect="compressed-tensors"))
    with pytest.raises(CheckpointError, match=r"576 rows in blocks of 128"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "kept", Recipe(method="keep", dialect="vllm-omni"))

    convert_checkpoint(transformer, tmp_path / "ours", Recipe(**blocks))
    (tmp_path / "ours" / "omni_convert.json").unlink()  # which says that it is for another runtime
    (component,) = verify_source(resolve_source(tmp_path / "ours"))
    assert "indivisible-width" in {finding.check for finding in component.findings}


def test_parts_that_blocks_divide_are_kept(transformer: Path, tmp_path: Path) -> None:
    convert_checkpoint(
        transformer, tmp_path / "theirs", Recipe(method="fp8", weight_block_size=(64, 64), dialect="compressed-tensors")
    )
    convert_checkpoint(tmp_path / "theirs", tmp_path / "kept", Recipe(method="keep", dialect="vllm-omni"))
    with open_quantized(tmp_path / "kept") as kept:
        assert "transformer_blocks.0.attn.to_q" in kept.layers


def remedies(folder: Path) -> dict[str, str]:
    (component,) = inspect_source(resolve_source(folder))
    return {verdict.runtime: str(verdict) for verdict in component.runtimes}


def test_layers_that_no_dialect_holds_are_quantized_again(transformer: Path, tmp_path: Path) -> None:
    """INT8 with static inputs, as msModelSlim writes it."""
    model = tmp_path / "model"
    convert_checkpoint(transformer, model, Recipe(method="int8", dialect="msmodelslim", search=False))
    (file,), (labels,) = model.glob("*.safetensors"), model.glob("quant_model_description*.json")
    tensors, described = load_file(file), json.loads(labels.read_text())
    for stem in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        static = {"input_scale": torch.tensor([0.05]), "input_offset": torch.zeros(1)}
        static["deq_scale"] = tensors[f"{stem}.weight_scale"].flatten() * 0.05
        static["quant_bias"] = torch.zeros(len(static["deq_scale"]), dtype=torch.int32)
        tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in static.items()}
    described = {
        name: "W8A8" if name in tensors and "FLOAT" not in str(described.get(name)) else label
        for name, label in {**dict.fromkeys(tensors, "W8A8"), **described}.items()
    }
    save_file(tensors, file)
    labels.write_text(json.dumps(described))
    advice = remedies(model)
    assert not any("-m keep" in why for why in advice.values()), advice
    assert "-m METHOD" in advice["omni_convert.loaders"]
    with pytest.raises(CheckpointError, match="-m METHOD"):
        convert_checkpoint(model, tmp_path / "kept", Recipe(method="keep", runtime="diffusers"))


def test_what_our_loader_alone_can_have_is_kept_for_it(transformer: Path, tmp_path: Path) -> None:
    """Blocks that reach into another part of a layer that vLLM-Omni merges."""
    blocks = {"method": "fp8", "weight_block_size": (128, 128), "runtime": "diffusers"}
    convert_checkpoint(transformer, tmp_path / "theirs", Recipe(**blocks, dialect="compressed-tensors"))
    advice = remedies(tmp_path / "theirs")
    assert "-m keep --dialect vllm-omni --runtime diffusers" in advice["omni_convert.loaders"]
    assert "-m METHOD" in advice["vLLM-Omni 0.30"]
    convert_checkpoint(tmp_path / "theirs", tmp_path / "kept", Recipe(method="keep", runtime="diffusers"))
    with open_quantized(tmp_path / "theirs") as before, open_quantized(tmp_path / "kept") as after:
        for stem, layer in before.layers.items():
            assert layer.dequantize(0, 64).equal(after.layers[stem].dequantize(0, 64))
