"""Budgets of a pipeline with two denoisers, Wan2.2's: both are differentiated, and share what the budget allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.inspection.verification_report import count_of
from omni_convert.convert.precision.analysis import analyze
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.statistics.statistics import Statistics

EXPERTS = ("transformer", "transformer_2")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers|transformers")


def expert() -> Any:
    return diffusers.WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        ffn_dim=256,
        freq_dim=32,
    )


@pytest.fixture(scope="module")
def wan(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose experts take one of two steps each."""
    folder = tmp_path_factory.mktemp("models") / "wan"
    encoder = UMT5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = diffusers.WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(tiny_pipeline_folder / "tokenizer"),
            text_encoder=UMT5EncoderModel(encoder).eval(),
            vae=diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=expert(),
            transformer_2=expert(),
            boundary_ratio=0.9,
        ).to(torch.bfloat16)
    pipe.save_pretrained(folder)
    defaults = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0}
    (folder / "generation_defaults.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="module")
def calibration(wan: Path, record_sensitivity: Callable[[Path], Path]) -> Path:
    return record_sensitivity(wan)


def test_both_experts_have_a_sensitivity(wan: Path, calibration: Path) -> None:
    sensitivity = Statistics.load(calibration).sensitivity
    assert sensitivity is not None
    assert {name.partition(".")[0] for name in sensitivity.layers} == {*EXPERTS}
    analysis = analyze(
        resolve_source(wan),
        Recipe("fp8", calibration=(calibration,), formats=("fp8", "bf16")),
        Statistics.load(calibration),
    )
    assert {unit.component for unit in analysis.units} == {*EXPERTS}
    assert all(unit.option("fp8").error > 0 for unit in analysis.units)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"method": "fp8", "formats": ("fp8", "bf16"), "target_bits": 11.0}, ("fp8 static",)),
        ({"dialect": "comfyui", "target_bits": 6.0}, ("fp8 static", "nvfp4")),
        ({"method": "gguf", "target_bits": 6.0, "formats": ("Q4_0", "Q8_0")}, ("gguf Q4_0", "gguf Q8_0")),
    ],
    ids=str,
)
def test_experts_share_a_budget(
    options: dict[str, Any], labels: tuple[str, ...], wan: Path, calibration: Path, tmp_path: Path
) -> None:
    report = convert_checkpoint(wan, tmp_path / "out", Recipe(calibration=(calibration,), **options))
    assert any("predicted noise ratio" in note for note in report.notes)
    manifest = json.loads((tmp_path / "out" / "omni_convert.json").read_text())["components"]
    layers = {f"{name}.{stem}": layer for name in EXPERTS for stem, layer in manifest[name]["layers"].items()}
    assert {layer["format"] for layer in layers.values()} == set(labels)
    bits = options["target_bits"]
    assert all(manifest[name]["layers"] for name in EXPERTS)
    kept = [reason for name in EXPERTS for reason in manifest[name]["kept"].values()]
    assert any(f"BF16 by --target-bits {bits}" in reason for reason in kept) == (options.get("method") == "fp8")
    assert count_of(verify_source(resolve_source(tmp_path / "out"), None, lambda _: None), "error") == 0


def test_a_mixture_that_vllm_omni_cannot_load_is_refused(wan: Path, calibration: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot load ModelOpt blocks for Wan.*--formats fp8,bf16"):
        convert_checkpoint(wan, tmp_path / "out", Recipe(calibration=(calibration,), target_bits=6.0))
    assert not (tmp_path / "out").exists()
