"""AutoRound's own export of a text encoder in MX formats, read by us. W4A16 is in test_torch_libraries.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.views.opened import open_quantized


@pytest.fixture
def export(import_peer, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function that has them quantize the text encoder by a scheme of theirs, and returns the folder."""
    auto_round = import_peer("auto_round")
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    monkeypatch.chdir(tmp_path)  # they leave a folder behind

    def run(scheme: str) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            model = Qwen3ForCausalLM.from_pretrained(tiny_pipeline_folder / "text_encoder", dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(tiny_pipeline_folder / "tokenizer")
            rounding = auto_round.AutoRound(
                model, tokenizer, scheme=scheme, iters=0, disable_opt_rtn=True, device_map="cpu"
            )
            rounding.quantize_and_save(str(tmp_path / "theirs"), format="auto_round")
        (config,) = (tmp_path / "theirs").rglob("config.json")
        return config.parent

    return run


def weight_by_them(import_peer, tensors: dict[str, Tensor], stem: str) -> Tensor:  # type: ignore[no-untyped-def]
    """The weight in float32, by the classes with which they run such a model."""
    modules = import_peer("auto_round.experimental.qmodules")
    scale = tensors[f"{stem}.weight_scale"]
    is_packed = f"{stem}.weight_packed" in tensors
    codes = tensors[f"{stem}.weight_packed" if is_packed else f"{stem}.weight"]
    config = import_peer("auto_round.schemes").PRESET_SCHEMES["MXFP4" if is_packed else "MXFP8"]
    shape = (codes.shape[1] * (2 if is_packed else 1), codes.shape[0])
    kind = modules.MXFP4QuantLinear if is_packed else modules.MXFP8QuantLinear
    linear = kind(*shape, config)
    linear.load_state_dict({("weight_packed" if is_packed else "weight"): codes, "weight_scale": scale})
    return linear.dequant_weight_online().float()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8"])
def test_their_export_is_read(import_peer, export, scheme: str) -> None:  # type: ignore[no-untyped-def]
    folder = export(scheme)
    tensors = load_file(folder / "model.safetensors")
    with open_quantized(folder) as opened:
        assert opened.dialect == "auto-round"
        assert {layer.format.label for layer in opened.layers.values()} == {scheme.lower()}
        assert len(opened.layers) == 14
        for stem, layer in opened.layers.items():
            assert layer.dequantize(0, layer.shape[0]).equal(weight_by_them(import_peer, tensors, stem))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["MXINT4", "NVFP4_E5M3"])
def test_their_export_that_looks_like_another_format_is_refused(export, scheme: str) -> None:  # type: ignore[no-untyped-def]
    folder = export(scheme)
    data_type = json.loads((folder / "config.json").read_text())["quantization_config"]["data_type"]
    with pytest.raises(CheckpointError, match=rf"found data_type '{data_type}'.*export as MXFP4"):
        open_quantized(folder)
